"""Hull: against a walk in Python loops."""

import numpy as np
import pytest

from lq.allocation.solvers.hull import descend, hull
from lq.allocation.solvers.problem import Problem
from tests.allocation.solvers.problems import integers, ragged, realistic


def walk(losses, cost):
    """(start, [(target, slope), ...]) of one item, by looking at every option in turn."""
    real = [j for j in range(len(losses)) if losses[j] < np.inf]
    now = start = min(real, key=lambda j: (losses[j], cost[j]))
    steps = []
    while cheaper := [j for j in real if cost[j] < cost[now]]:
        now, last = min(cheaper, key=lambda j: ((losses[j] - losses[now]) / (cost[now] - cost[j]), cost[j])), now
        steps.append((now, (losses[now] - losses[last]) / (cost[last] - cost[now])))
    return start, steps


@pytest.mark.parametrize("make", [realistic, integers, ragged])
@pytest.mark.parametrize("seed", range(5))
def test_steps(make, seed):
    problem = make(seed, 30)
    steps = hull(problem.losses, problem.costs[0])
    assert (np.diff(steps.slopes) >= 0).all()
    for i in range(30):
        start, expected = walk(problem.losses[i].tolist(), problem.costs[0, i].tolist())
        mine = steps.items == i
        assert steps.start[i] == start
        assert steps.targets[mine].tolist() == [target for target, _ in expected]
        assert steps.origins[mine].tolist() == [start, *steps.targets[mine][:-1]][: mine.sum()]
        assert steps.slopes[mine] == pytest.approx([slope for _, slope in expected])


def test_descending_stops_at_the_first_choice_within_the_limit():
    problem = Problem([[9, 3, 2.5, 1], [8, 7, 1, 0]], [[[1, 2, 3, 4], [1, 2, 3, 4]]], [5])
    choice, slope = descend(problem, np.ones(1))
    assert choice.tolist() == [1, 2]
    assert slope == 1
    assert descend(problem.limited(0, np.inf), np.ones(1))[0].tolist() == [3, 3]
    assert descend(problem.limited(0, 1.0), np.ones(1)) is None
