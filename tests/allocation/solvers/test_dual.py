"""Prices: against the linear relaxation, whose value the best bound is."""

import numpy as np
import pytest
from scipy.optimize import linprog

from lq.allocation.solvers.dual import dual_bound, dual_prices, priced_choice, reduced_losses
from lq.allocation.solvers.problem import Problem
from tests.allocation.solvers.problems import integers, realistic


def relaxed(problem):
    items, options = problem.losses.shape
    return linprog(
        problem.losses.ravel(),
        A_ub=problem.costs.reshape(len(problem.limits), -1) / problem.limits[:, None],
        b_ub=np.ones(len(problem.limits)),
        A_eq=np.kron(np.eye(items), np.ones(options)),
        b_eq=np.ones(items),
        bounds=(0, 1),
    )


@pytest.mark.parametrize("constraints", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_bound_is_that_of_the_relaxation(constraints, seed):
    problem = integers(seed, 20, constraints)
    answer = relaxed(problem)
    if answer.status == 0:
        prices = dual_prices(problem)
        assert (prices >= 0).all()
        assert dual_bound(problem, prices) == pytest.approx(answer.fun, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("constraints", [1, 3])
def test_units_do_not_matter(constraints):
    problem = realistic(0, 40, constraints)
    unit = 10.0 ** np.arange(9, 9 - 8 * constraints, -8)
    scaled = Problem(problem.losses * 1e-9, problem.costs * unit[:, None, None], problem.limits * unit)
    bound = dual_bound(problem, dual_prices(problem))
    assert dual_bound(scaled, dual_prices(scaled)) * 1e9 == pytest.approx(bound, rel=1e-6)


def test_no_binding_limit_has_no_price():
    problem = realistic(0, 5, 2, share=1.0)
    assert dual_prices(problem).tolist() == [0, 0]
    assert priced_choice(problem, np.zeros(2)).tolist() == problem.losses.argmin(1).tolist()
    assert (reduced_losses(problem, np.zeros(2)).min(1) == 0).all()


def test_equal_losses_have_no_price():
    problem = Problem(np.ones((3, 2)), [[[1, 2]] * 3, [[2, 1]] * 3], [4, 5])
    assert dual_prices(problem).tolist() == [0, 0]
