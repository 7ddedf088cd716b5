"""Allocation: one option per item within budgets, by interchangeable solvers; plain numbers in, no model in sight."""

from collections.abc import Callable

from lq.allocation.exact import Exact as Exact
from lq.allocation.greedy import Greedy as Greedy
from lq.allocation.lagrangian import Lagrangian as Lagrangian
from lq.allocation.problem import Problem as Problem
from lq.allocation.problem import Solution as Solution
from lq.errors import SpecError

#: What turns a problem into a solution.
Solver = Callable[[Problem], Solution]

SOLVERS: dict[str, Solver] = {"greedy": Greedy(), "lagrangian": Lagrangian(), "exact": Exact()}


def solver(solver: str | Solver) -> Solver:
    """The solver of that name, or the solver itself.

    Raises:
        SpecError: for a name that is not in `SOLVERS`.

    >>> solver("greedy")
    Greedy()
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise SpecError(f"solver={solver!r} is unknown; use {', '.join(map(repr, SOLVERS))} or a solver object")
    return SOLVERS[solver]
