"""The Pareto front: against all choices of a small problem."""

from itertools import product

import numpy as np
import pytest

from lq.allocation.solvers import SOLVERS, Exact, pareto_front
from lq.errors import BudgetError, SpecError
from tests.allocation.solvers.problems import integers, realistic


def test_small_fronts_are_complete():
    problem = integers(0, 4, options=4)
    span = int(problem.greatest_costs[0] - problem.least_costs[0])
    front = pareto_front(problem, solver="exact", points=span + 1)  # integer costs: a superset of all limits that count
    all_ = [(problem.totals(np.array(c))[0], problem.loss(np.array(c))) for c in product(range(4), repeat=4)]
    best = [(c, x) for c, x in set(all_) if not any(d <= c and y <= x and (d, y) != (c, x) for d, y in all_)]
    assert {(one.costs[0], one.loss) for one in front} <= set(best)
    assert (front[0].costs[0], front[0].loss) == min(best)
    assert front[-1].loss == min(x for _, x in best)


@pytest.mark.parametrize("solver", [*SOLVERS, Exact(5)])
def test_fronts_rise_in_cost_and_fall_in_loss(solver):
    problem = realistic(0, 15, 2, share=0.6)
    front = pareto_front(problem, solver=solver, points=8, constraint=1)
    costs, losses = [one.costs[1] for one in front], [one.loss for one in front]
    assert 2 < len(front) <= 8
    assert (np.diff(costs) > 0).all() and (np.diff(losses) < 0).all()
    assert all(one.costs[0] <= problem.limits[0] * (1 + 1e-9) for one in front)
    assert costs[0] == pytest.approx(problem.least_costs[1])


def test_its_own_limit_is_not_read():
    problem = realistic(0, 10)
    fronts = [pareto_front(problem.limited(0, limit), points=4) for limit in (0.0, np.inf)]
    assert [one.loss for one in fronts[0]] == [one.loss for one in fronts[1]]


def test_one_choice_is_a_front_of_one():
    problem = realistic(0, 3)
    only = type(problem)(problem.losses[:, :1], problem.costs[:, :, :1], problem.limits)
    assert len(pareto_front(only)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "points=1 make no front; use at least 2"),
        ({"constraint": 1}, "constraint=1 does not exist; use 0 to 0"),
        ({"solver": "best"}, "solver='best' is unknown"),
    ],
)
def test_errors(options, message):
    with pytest.raises(SpecError, match=message):
        pareto_front(realistic(0, 3), **options)


def test_other_limits_that_cannot_be_met():
    with pytest.raises(BudgetError, match="cost 0 <= 0 is asked for"):
        pareto_front(realistic(0, 3, 2).limited(0, 0.0), constraint=1)
