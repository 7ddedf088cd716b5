r"""Lagrangian: every item picks ``argmin_j losses[i, j] + prices . costs[:, i, j]`` by itself.

The method of RDO-Q (Wang et al., ECCV 2022), which trades rate for distortion by one multiplier. What deviates: the
multipliers of any number of limits are those of the best lower bound (`lq.allocation.solvers.dual`), found exactly for
one; the choice is where the walk down the hulls at these prices meets the limits, which settles the items that are
undecided at them; and it is polished (`lq.allocation.solvers.polish`), as multipliers alone skip all allocations that
are not on a hull.

With one limit, this is the walk of `lq.allocation.solvers.greedy`: its slopes are the multipliers.
"""

from dataclasses import dataclass

from lq.allocation.solvers.dual import dual_prices
from lq.allocation.solvers.feasible import feasible_choice
from lq.allocation.solvers.polish import polish
from lq.allocation.solvers.problem import Problem, Solution


@dataclass(frozen=True)
class Lagrangian:
    """The choice at the best prices of the limits, polished."""

    def __call__(self, problem: Problem) -> Solution:
        """Return a choice near the optimum.

        Raises:
            BudgetError: if no choice meets all limits.

        >>> Lagrangian()(Problem(losses=[[3, 1], [5, 0]], costs=[[[1, 4], [1, 4]]], limits=[5])).choice
        array([0, 1])
        """
        problem.check_limits()
        prices = dual_prices(problem)
        return polish(problem, feasible_choice(problem, prices), prices)
