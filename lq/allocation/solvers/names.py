"""The solvers by name; each turns a problem into a solution."""

from collections.abc import Callable

from lq.allocation.solvers.exact import Exact
from lq.allocation.solvers.greedy import Greedy
from lq.allocation.solvers.lagrangian import Lagrangian
from lq.allocation.solvers.problem import Problem, Solution
from lq.errors import SpecError

Solver = Callable[[Problem], Solution]

SOLVERS: dict[str, Solver] = {"greedy": Greedy(), "lagrangian": Lagrangian(), "exact": Exact()}


def solver(solver: str | Solver) -> Solver:
    """The solver of that name, or the solver itself.

    Raises:
        SpecError: for a name that is not in `SOLVERS`.

    >>> solver("exact")
    Exact(time_limit=60.0)
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise SpecError(f"solver={solver!r} is unknown; use {', '.join(map(repr, SOLVERS))} or a solver object")
    return SOLVERS[solver]
