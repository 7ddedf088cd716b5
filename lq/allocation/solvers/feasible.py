r"""A first choice within all limits: down the hulls of a weighted cost.

The walk ends within the limits whenever there is one limit, or every cost of an item falls where the others do. Else
the last cost is minimized within the other limits, and these are met the same way, down to a single one.
"""

import numpy as np

from lq.allocation.solvers.dual import dual_prices
from lq.allocation.solvers.hull import descend
from lq.allocation.solvers.problem import Floats, Ints, Problem
from lq.allocation.solvers.program import optimal
from lq.errors import BudgetError

_SECONDS = 60.0


def feasible_choice(problem: Problem, weights: Floats) -> Ints:
    """A choice within all limits that loses little, shape (items,).

    Args:
        problem: what to allocate.
        weights: value of a unit of each cost, shape (constraints,).

    Raises:
        BudgetError: if no choice meets all limits, or none was found in a minute.
    """
    problem.check_limits()
    unit = np.maximum(problem.greatest_costs, np.finfo(np.float64).tiny)
    share = weights * unit
    share = share / share.max() if share.any() else share
    for others in (0.0, 0.01, 1.0):  # costs without weight count too if it has to be
        found = descend(problem, (share + others) / unit)
        if found:
            return found[0]
    *kept, last = np.flatnonzero(np.isfinite(problem.limits))
    rest = Problem(
        np.where(problem.exists, problem.costs[last], np.inf),
        problem.costs[kept],
        problem.limits[kept],
        tuple(problem.names[c] for c in kept),
    )
    prices = dual_prices(rest)
    least = optimal(rest, feasible_choice(rest, prices), prices, _SECONDS)
    if problem.meets(least.choice):
        return least.choice
    rest_met = ", ".join(f"{problem.names[c]} <= {problem.limits[c]:.15g}" for c in kept)
    name, limit = problem.names[last], problem.limits[last]
    proof = "is at least" if least.gap == 0 else f"was not found in {_SECONDS:.0f} seconds to be below"
    raise BudgetError(
        f"no allocation meets the budgets: {name} <= {limit:.15g} is asked for, but with {rest_met} it {proof} "
        f"{least.loss:.15g}; raise the limits or add options"
    )
