"""Polishing: refills what is left, improves any start, and proves what it says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.allocation.solvers import Problem
from lq.allocation.solvers.dual import dual_prices
from lq.allocation.solvers.polish import polish, refill
from tests.allocation.solvers.problems import enumerated, integers, realistic


def cheapest(problem):
    return np.where(problem.exists, problem.costs[0], np.inf).argmin(1)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_more_fits_after_a_refill(seed):
    problem = realistic(seed, 30)
    choice = refill(problem, cheapest(problem), dual_prices(problem))
    assert problem.meets(choice)
    left = problem.ceilings[0] - problem.totals(choice)[0]
    for i, j in np.ndindex(problem.losses.shape):
        better = problem.losses[i, j] < problem.losses[i, choice[i]]
        assert not (better and problem.costs[0, i, j] - problem.costs[0, i, choice[i]] <= left * (1 - 1e-9))


def test_refill_takes_the_most_gain_per_unit_first():
    problem = Problem([[8, 0], [5, 0], [3, 0]], [[[0, 4], [0, 2], [0, 2]]], [4])
    assert refill(problem, np.zeros(3, dtype=int), np.ones(1)).tolist() == [0, 1, 1]


def test_refill_takes_the_most_gain_when_nothing_has_a_price():
    problem = Problem([[3, 2, 0]], [[[0, 1, 2]]], [2])
    assert refill(problem, np.array([0]), np.zeros(1)).tolist() == [2]


def test_items_are_exchanged():
    # from (0, 1): two moves that fit only together
    problem = Problem([[5, 0], [2, 0]], [[[0, 3], [0, 3]]], [3])
    solution = polish(problem, np.array([0, 1]), dual_prices(problem))
    assert solution.choice.tolist() == [1, 0]
    assert solution.gap == 0


@pytest.mark.parametrize("make", [realistic, integers])
@pytest.mark.parametrize("seed", range(10))
def test_a_poor_start_ends_at_the_optimum(make, seed):
    problem = make(seed, 4)
    solution = polish(problem, cheapest(problem), dual_prices(problem))
    assert solution.loss == pytest.approx(enumerated(problem))
    assert solution.gap == 0


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.lists(st.integers(-9, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    costs=st.lists(st.integers(0, 9), min_size=24, max_size=24),
    share=st.floats(0, 1),
    constraints=st.integers(1, 2),
)
def test_any_small_problem(losses, costs, share, constraints):
    costs = np.array(costs, dtype=float).reshape(2, 4, 3)[:constraints, : len(losses)]
    start = costs.sum(0).argmin(1)
    cost = costs[:, np.arange(len(start)), start].sum(1)
    problem = Problem(losses, costs, np.floor(cost + share * (costs.max(2).sum(1) - cost)))
    solution = polish(problem, start, dual_prices(problem))
    best = enumerated(problem)
    assert solution.bound <= best + 1e-9
    assert solution.loss == pytest.approx(best)
    assert problem.meets(solution.choice)
