r"""Greedy: from the most expensive useful options down, the step first that loses least per unit saved.

The method of MPQCO (Chen et al., Towards Mixed-Precision Quantization of Neural Networks via Constrained Optimization,
ICCV 2021): drop dominated options, start at the highest cost, and repeat until the budget is met. All steps are sorted
at once (`lq.allocation.solvers.hull`). What deviates: the choice is polished (`lq.allocation.solvers.polish`), as the
last step saves more than it must; and with several limits a unit is a weighted sum of the costs. Its weights start as
``1 / excess`` and fall where a walk left a limit unused, ``weight *= (total / limit) ** 4``; the best of ten walks
counts.
"""

from dataclasses import dataclass

import numpy as np

from lq.allocation.solvers.dual import dual_prices
from lq.allocation.solvers.feasible import feasible_choice
from lq.allocation.solvers.polish import polish
from lq.allocation.solvers.problem import Ints, Problem, Solution

_WALKS = 10
_POWER = 4


@dataclass(frozen=True)
class Greedy:
    """The best of the choices where the cheapest ways down meet the limits, polished."""

    def __call__(self, problem: Problem) -> Solution:
        """Return a choice near the optimum.

        Raises:
            BudgetError: if no choice meets all limits.

        >>> Greedy()(Problem(losses=[[3, 1], [5, 0]], costs=[[[1, 4], [1, 4]]], limits=[5])).choice
        array([0, 1])
        """
        problem.check_limits()
        excess = problem.totals(problem.losses.argmin(1)) - problem.ceilings
        exceeded = np.flatnonzero(excess > 0)
        weights = np.zeros(len(excess))
        weights[exceeded] = 1 / excess[exceeded]
        walks: list[Ints] = []
        for _ in range(_WALKS if len(exceeded) > 1 else 1):
            walks.append(feasible_choice(problem, weights))
            used = problem.totals(walks[-1])[exceeded] / np.maximum(
                problem.ceilings[exceeded], np.finfo(np.float64).tiny
            )
            weights[exceeded] *= used**_POWER
        return polish(problem, min(walks, key=problem.loss), dual_prices(problem))
