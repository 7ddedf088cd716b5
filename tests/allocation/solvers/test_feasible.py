"""First choices: within the limits whenever there is one, by enumeration."""

import numpy as np
import pytest

from lq.allocation.solvers.feasible import feasible_choice
from lq.allocation.solvers.problem import Problem
from lq.errors import BudgetError
from tests.allocation.solvers.problems import enumerated, integers, realistic


@pytest.mark.parametrize("constraints", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_a_choice_is_found_if_there_is_one(constraints, seed):
    problem = integers(seed, 4, constraints, options=4)
    if np.isfinite(enumerated(problem)):
        assert problem.meets(feasible_choice(problem, np.zeros(constraints)))
    else:
        with pytest.raises(BudgetError, match="no allocation meets the budgets"):
            feasible_choice(problem, np.zeros(constraints))


def test_limits_that_cannot_be_met_together():
    problem = Problem([[0, 0], [0, 0]], [[[1, 5], [1, 5]], [[5, 1], [5, 1]]], [3, 3], names=("bytes", "macs"))
    message = r"macs <= 3 is asked for, but with bytes <= 3 it is at least 10; raise the limits or add options"
    with pytest.raises(BudgetError, match=message):
        feasible_choice(problem, np.ones(2))


def test_the_walk_misses_a_choice_that_is_there():
    # only the middle option meets both limits, and it is above the hull of every sum of the costs
    problem = Problem([[0, 1, 0]], [[[1, 6, 9]], [[9, 6, 1]]], [7, 7])
    assert feasible_choice(problem, np.ones(2)).tolist() == [1]


def test_the_least_limit_is_feasible():
    problem = realistic(0, 100, share=0.0)
    assert (feasible_choice(problem, np.ones(1)) == 0).all()
