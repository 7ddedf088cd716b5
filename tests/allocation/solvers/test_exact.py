"""Exact: equals enumeration."""

import numpy as np
import pytest

from lq.allocation.solvers import Exact, Problem
from lq.errors import SpecError
from tests.allocation.solvers.problems import enumerated, integers, ragged, realistic


@pytest.mark.parametrize("make", [integers, ragged, realistic])
@pytest.mark.parametrize("constraints", [1, 2, 3])
def test_exact_is_enumeration(make, constraints):
    checked = 0
    for seed in range(10, 20):
        problem = make(seed, 4, constraints)
        if np.isfinite(best := enumerated(problem)):
            solution = Exact()(problem)
            assert solution.loss == pytest.approx(best)
            assert solution.gap == 0
            checked += 1
    assert checked


def test_parity_that_bounds_do_not_see():
    # all costs are even, the limit is odd: no bound is met, only complete search proves
    rng = np.random.default_rng(0)
    costs = 2.0 * rng.integers(10, 50, (12, 3))
    problem = Problem(200 - costs, costs[None], [float(int(costs.mean(1).sum()) // 2 * 2 + 1)])
    solution = Exact()(problem)
    assert solution.gap == 0
    assert solution.costs[0] == problem.limits[0] - 1


def test_a_time_limit_leaves_a_choice_and_a_bound():
    problem = realistic(21, 60, 3)
    solution = Exact(time_limit=1e-6)(problem)
    proved = Exact()(problem)
    assert problem.meets(solution.choice)
    assert solution.bound <= proved.loss * (1 + 1e-12) <= solution.loss * (1 + 2e-12)
    assert proved.gap == 0


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_errors(limit):
    with pytest.raises(SpecError, match=f"time_limit={limit} is no time; use a positive number of seconds"):
        Exact(time_limit=limit)
