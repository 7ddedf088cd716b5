"""Problem and Solution: validation, totals, messages."""

import numpy as np
import pytest

from lq.allocation.solvers import Problem, Solution
from lq.errors import BudgetError, LqError, SpecError

LOSSES = [[3.0, 1.0], [5.0, np.inf]]
COSTS = [[[1.0, 4.0], [2.0, np.nan]]]


def test_totals():
    problem = Problem(LOSSES, COSTS, [5])
    choice = np.array([1, 0])
    assert problem.loss(choice) == 6
    assert problem.totals(choice).tolist() == [6]
    assert not problem.meets(choice)
    assert problem.limited(0, 6.0).meets(choice)
    assert problem.least_costs.tolist() == [3] and problem.greatest_costs.tolist() == [6]
    assert problem.exists.tolist() == [[True, True], [True, False]]


def test_it_is_frozen_and_a_copy():
    losses = np.array([[1.0, 2.0]])
    problem = Problem(losses, [[[2.0, 1.0]]], [2])
    losses[0, 0] = 9
    assert problem.losses[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        problem.losses[0, 0] = 9


@pytest.mark.parametrize(
    ("losses", "costs", "limits", "names", "message"),
    [
        ([1.0], COSTS, [5], (), r"losses of shape \(1,\) are no problem; use \(items, options\)"),
        (np.zeros((0, 2)), np.zeros((1, 0, 2)), [5], (), r"losses of shape \(0, 2\) are no problem"),
        ([[1, 2], [3]], COSTS, [5], (), "losses are no array of numbers.*use equal rows, with inf"),
        (LOSSES, [[[1.0, 4.0]]], [5], (), r"costs of shape \(1, 1, 2\) do not fit losses of shape \(2, 2\)"),
        (LOSSES, COSTS, [5, 6], (), r"limits of shape \(2,\) do not fit 1 costs"),
        (LOSSES, COSTS, [5], ("a", "b"), "2 names were given for 1 costs"),
        ([[np.nan, 1], [1, 1]], COSTS, [5], (), "losses have NaN or -inf"),
        ([[-np.inf, 1], [1, 1]], COSTS, [5], (), "losses have NaN or -inf"),
        ([[1, 1], [np.inf, np.inf]], COSTS, [5], (), "item 1 has no option"),
        ([[1, 1], [1, 1]], COSTS, [5], (), "costs of existing options must be finite and not negative"),
        (LOSSES, [[[-1, 4], [2, 0]]], [5], (), "costs of existing options must be finite and not negative"),
        (LOSSES, COSTS, [np.nan], (), r"limits=\[nan\] have NaN or negative entries"),
        (LOSSES, COSTS, [-1], (), r"limits=\[-1.0\] have NaN or negative entries"),
    ],
)
def test_errors(losses, costs, limits, names, message):
    with pytest.raises(SpecError, match=message):
        Problem(losses, costs, limits, names)


def test_infeasible_limits_say_what_is_feasible():
    problem = Problem([[3, 1], [5, 0]], [[[1, 4], [1, 4]], [[1, 1], [1, 1]]], [1.5, 2], names=("bytes", "macs"))
    with pytest.raises(BudgetError, match=r"bytes <= 1.5 is asked for, feasible are 2 to 8; raise") as info:
        problem.check_limits()
    assert "macs" not in str(info.value)
    assert isinstance(info.value, LqError) and isinstance(info.value, ValueError)
    with pytest.raises(BudgetError, match=r"cost 0 <= 0 is asked for, feasible are 1 to 4"):
        Problem([[3, 1]], [[[1, 4]]], [0]).check_limits()


@pytest.mark.parametrize(
    ("loss", "bound", "gap"), [(2, 2, 0), (3, 2, 0.5), (-1, -2, 0.5), (0, 0, 0), (1, 0, np.inf), (1, 1.5, 0)]
)
def test_gap(loss, bound, gap):
    assert Solution(np.array([0]), loss, np.array([1.0]), bound).gap == gap
