"""Lagrangian: near the optimum on random problems of every size."""

import pytest

from lq.allocation.solvers import Exact, Lagrangian
from lq.errors import BudgetError
from tests.allocation.solvers.problems import integers, realistic


@pytest.mark.parametrize("make", [realistic, integers])
def test_one_limit(make):
    for seed in range(100):
        problem = make(seed, 5 + seed % 56)
        best = Exact()(problem).loss
        solution = Lagrangian()(problem)
        assert problem.meets(solution.choice)
        assert solution.bound <= best * (1 + 1e-12)
        assert solution.loss <= best * 1.005


@pytest.mark.parametrize("make", [realistic, integers])
@pytest.mark.parametrize("constraints", [2, 3])
def test_several_limits(make, constraints):
    feasible = 0
    for seed in range(6):
        problem = make(seed, 5 + 5 * seed, constraints)
        try:
            best = Exact()(problem).loss
        except BudgetError:
            continue
        assert Lagrangian()(problem).loss <= best * 1.01
        feasible += 1
    assert feasible >= 4


def test_thousands_of_items():
    problem = realistic(1, 3000)
    assert Lagrangian()(problem).loss <= Exact()(problem).loss * 1.0001
