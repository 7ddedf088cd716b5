"""The search of the core: complete and right on small problems, honest when cut off."""

import numpy as np
import pytest

from lq.allocation.solvers.core import search
from lq.allocation.solvers.dual import dual_bound, dual_prices
from lq.allocation.solvers.feasible import feasible_choice
from lq.allocation.solvers.hull import descend
from lq.errors import BudgetError
from tests.allocation.solvers.problems import enumerated, integers, ragged, realistic


def started(problem):
    prices = dual_prices(problem)
    found = descend(problem, prices + 1e-3 / problem.limits)
    return prices, None if found is None else found[0]


@pytest.mark.parametrize("make", [integers, ragged])
@pytest.mark.parametrize("constraints", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_complete_search_finds_the_best(make, constraints, seed):
    problem = make(seed, 5, constraints, options=4)
    prices, start = started(problem)
    if start is None and np.isinf(enumerated(problem)):
        with pytest.raises(BudgetError):
            feasible_choice(problem, prices)
        return
    start = feasible_choice(problem, prices) if start is None else start
    within = problem.loss(start) - dual_bound(problem, prices) + 1e-9
    found, complete = search(problem, start, prices, within)
    assert complete
    assert problem.meets(found)
    assert problem.loss(found) == pytest.approx(enumerated(problem))


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_found_below_a_proved_bound(seed):
    problem = realistic(seed, 5)
    prices, start = started(problem)
    bound, best = dual_bound(problem, prices), enumerated(problem)
    found, complete = search(problem, start, prices, 0.9 * (best - bound) + 1e-15)
    assert complete and (found == start).all()


@pytest.mark.parametrize("cut", [{"items": 5}, {"states": 200}])
def test_a_search_that_is_cut_off_says_so(cut):
    problem = realistic(0, 40, 2, share=0.3)
    prices, start = started(problem)
    within = problem.loss(start) - dual_bound(problem, prices)
    found, complete = search(problem, start, prices, within, **cut)
    assert not complete
    assert problem.meets(found) and problem.loss(found) <= problem.loss(start)
    assert (found == search(problem, start, prices, within, **cut)[0]).all()


def test_large_swings_are_searched_first():
    problem = realistic(3, 200)
    prices, start = started(problem)
    within = problem.loss(start) - dual_bound(problem, prices)
    few, many = (problem.loss(search(problem, start, prices, within, items=n)[0]) for n in (8, 200))
    assert many <= few <= problem.loss(start)
    assert np.isfinite(many)
