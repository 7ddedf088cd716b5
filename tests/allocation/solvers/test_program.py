"""The integer program: the solver's part alone, the search switched off."""

import numpy as np
import pytest

from lq.allocation.solvers import program
from lq.allocation.solvers.dual import dual_bound, dual_prices
from lq.allocation.solvers.feasible import feasible_choice
from lq.errors import BudgetError
from tests.allocation.solvers.problems import enumerated, integers, ragged, realistic


def unpolished(problem, start, prices, **_):
    return problem.solution(start, dual_bound(problem, prices))


@pytest.fixture
def no_search(monkeypatch):
    """Starts are not improved."""
    monkeypatch.setattr(program, "polish", unpolished)


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("make", [integers, ragged, realistic])
@pytest.mark.parametrize("constraints", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_optimum(make, constraints, seed):
    problem = make(seed, 4, constraints)
    prices = dual_prices(problem)
    if np.isinf(best := enumerated(problem)):
        with pytest.raises(BudgetError):
            feasible_choice(problem, prices)
        return
    solution = program.optimal(problem, feasible_choice(problem, prices), prices, 60.0)
    assert solution.loss == pytest.approx(best)
    assert solution.gap == 0


@pytest.mark.usefixtures("no_search")
def test_answers_above_a_limit_are_forbidden(monkeypatch):
    problem = realistic(1, 20, share=0.4)
    solve, answers = program.milp, []

    def sloppy(losses, integrality, constraints, **kwargs):
        """The first answer costs most and ignores the limit."""
        if not answers:
            losses, constraints = -np.where(integrality, constraints[1].A[0], 0), constraints[:1]
        answers.append(solve(losses, integrality=integrality, constraints=constraints, **kwargs))
        return answers[-1]

    prices = dual_prices(problem)
    start = feasible_choice(problem, prices)
    right = program.optimal(problem, start, prices, 60.0)
    monkeypatch.setattr(program, "milp", sloppy)
    solution = program.optimal(problem, start, prices, 60.0)
    assert len(answers) > 1
    assert problem.meets(solution.choice)
    assert solution.loss == pytest.approx(right.loss)


@pytest.mark.usefixtures("no_search")
def test_no_time_returns_the_start():
    problem = realistic(0, 20)
    prices = dual_prices(problem)
    start = feasible_choice(problem, prices)
    solution = program.optimal(problem, start, prices, 1e-9)
    assert (solution.choice == start).all()
    assert solution.gap > 0
