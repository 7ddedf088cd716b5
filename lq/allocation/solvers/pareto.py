r"""The Pareto front of one cost: solutions at limits from the least to the greatest that makes a difference."""

from dataclasses import replace

import numpy as np

from lq.allocation.solvers.names import Solver
from lq.allocation.solvers.names import solver as solver_of
from lq.allocation.solvers.problem import Problem, Solution
from lq.errors import SpecError


def pareto_front(
    problem: Problem, *, solver: str | Solver = "lagrangian", points: int = 20, constraint: int = 0
) -> list[Solution]:
    """Solve at evenly spaced limits of one cost and keep what no other solution dominates.

    Args:
        problem: what to allocate; the limit of the cost itself is not read, the others hold.
        solver: "greedy", "lagrangian", "exact" or a solver object.
        points: number of limits, at least 2.
        constraint: index of the cost.

    Returns:
        Solutions of rising cost and falling loss, no more than `points`.

    Raises:
        SpecError: for an unknown solver, fewer than two points, a cost that does not exist.
        BudgetError: if no choice meets the other limits.

    >>> problem = Problem(losses=[[3, 1], [5, 0]], costs=[[[1, 4], [1, 4]]], limits=[5])
    >>> [(float(found.costs[0]), found.loss) for found in pareto_front(problem)]
    [(2.0, 8.0), (5.0, 3.0), (8.0, 1.0)]
    """
    if points < 2:
        raise SpecError(f"points={points} make no front; use at least 2")
    if not 0 <= constraint < len(problem.limits):
        raise SpecError(f"constraint={constraint} does not exist; use 0 to {len(problem.limits) - 1}")
    solve = solver_of(solver)
    unlimited = problem.limited(constraint, np.inf)
    cheapest = solve(replace(unlimited, losses=np.where(problem.exists, problem.costs[constraint], np.inf)))
    best = solve(unlimited)
    limits = np.linspace(cheapest.costs[constraint], best.costs[constraint], points)
    found = [solve(problem.limited(constraint, float(limit))) for limit in limits[:-1]]
    front: list[Solution] = []
    for one in sorted([*found, best], key=lambda one: (one.costs[constraint], one.loss)):
        if not front or one.loss < front[-1].loss:
            front.append(one)
    return front
