"""What all solvers share: one contract, checked for each by its name."""

import time

import numpy as np
import pytest

from lq.allocation.solvers import SOLVERS, Exact, Problem, solver
from lq.errors import BudgetError, SpecError
from tests.allocation.solvers.problems import enumerated, integers, ragged, realistic

each = pytest.mark.parametrize("name", SOLVERS)


def test_names():
    assert list(SOLVERS) == ["greedy", "lagrangian", "exact"]
    assert solver("exact") is SOLVERS["exact"]
    assert solver(Exact(1)) == Exact(1)
    with pytest.raises(SpecError, match="solver='dp' is unknown; use 'greedy', 'lagrangian', 'exact'.* or a solver"):
        solver("dp")


@each
@pytest.mark.parametrize("make", [integers, ragged, realistic])
@pytest.mark.parametrize("constraints", [1, 2])
def test_the_solution_adds_up_and_the_bound_holds(name, make, constraints):
    for seed in range(6):
        problem = make(seed, 4, constraints)
        if np.isinf(best := enumerated(problem)):
            continue
        solution = solver(name)(problem)
        picked = list(enumerate(solution.choice.tolist()))
        assert solution.loss == pytest.approx(sum(problem.losses[i, j] for i, j in picked))
        assert solution.costs == pytest.approx([sum(c[i, j] for i, j in picked) for c in problem.costs])
        assert (solution.costs <= problem.limits * (1 + 1e-9)).all()
        assert solution.bound <= best * (1 + 1e-12) + 1e-12
        assert solution.loss <= best * 1.005 + 1e-12


@each
def test_the_same_problem_has_the_same_solution(name):
    for problem in (realistic(0, 40), integers(1, 40, 2)):
        first, second = solver(name)(problem), solver(name)(problem)
        assert (first.choice == second.choice).all()
        assert first.bound == second.bound


@each
def test_no_limits(name):
    problem = realistic(0, 20, 2)
    free = Problem(problem.losses, problem.costs, [np.inf, np.inf])
    solution = solver(name)(free)
    assert (solution.choice == problem.losses.argmin(1)).all()
    assert solution.gap == 0
    assert solver(name)(Problem(problem.losses, np.zeros((0, 20, 9)), [])).loss == solution.loss


@each
def test_the_least_limit(name):
    problem = realistic(0, 20, share=0.0)
    assert (solver(name)(problem).choice == 0).all()


@each
def test_infeasible_limits(name):
    problem = realistic(0, 20)
    with pytest.raises(BudgetError, match="cost 0 <= 1 is asked for, feasible are"):
        solver(name)(problem.limited(0, 1.0))
    together = Problem([[0, 0]], [[[1, 5]], [[5, 1]]], [3, 3])
    with pytest.raises(BudgetError, match="cost 1 <= 3 is asked for, but with cost 0 <= 3 it is at least 5"):
        solver(name)(together)


@each
@pytest.mark.parametrize("loss", [1e-12, 1e3])
@pytest.mark.parametrize("cost", [1e-3, 1e8])
def test_units_do_not_matter(name, loss, cost):
    problem = realistic(2, 30)
    scaled = Problem(problem.losses * loss, problem.costs * cost, problem.limits * cost)
    solution, reference = solver(name)(scaled), solver(name)(problem)
    assert solution.loss == pytest.approx(reference.loss * loss, rel=1e-9)
    assert (solution.costs <= scaled.limits * (1 + 1e-9)).all()


@pytest.mark.parametrize(("name", "seconds"), [("greedy", 1), ("lagrangian", 1), ("exact", 10)])
def test_large_problems_take_little_time(name, seconds):
    problem, taken = realistic(6, 5000), []
    for _ in range(3):  # the least of a few: other work on the machine is not the solver's
        start = time.process_time()
        solution = solver(name)(problem)
        taken.append(time.process_time() - start)
        if taken[-1] < seconds:
            break
    assert min(taken) < seconds
    assert solution.gap < 0.02
