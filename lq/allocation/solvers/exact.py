r"""Exact: the optimum, by a mixed-integer solver on what a polished Lagrangian choice leaves undecided."""

from dataclasses import dataclass

from lq.allocation.solvers.dual import dual_prices
from lq.allocation.solvers.feasible import feasible_choice
from lq.allocation.solvers.problem import Problem, Solution
from lq.allocation.solvers.program import optimal
from lq.errors import SpecError


@dataclass(frozen=True)
class Exact:
    """The optimal choice; see `lq.allocation.solvers.program`.

    Args:
        time_limit: seconds after which the mixed-integer solver stops; then the choice is the best so far, its gap not
            0. The search before it takes a few seconds for thousands of items and is not cut off.

    Raises:
        SpecError: for a time limit that is not positive.
    """

    time_limit: float = 60.0

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise SpecError(f"time_limit={self.time_limit} is no time; use a positive number of seconds")

    def __call__(self, problem: Problem) -> Solution:
        """Return the optimal choice.

        Raises:
            BudgetError: if no choice meets all limits.

        >>> Exact()(Problem(losses=[[3, 1], [5, 0]], costs=[[[1, 4], [1, 4]]], limits=[5])).choice
        array([0, 1])
        """
        problem.check_limits()
        prices = dual_prices(problem)
        return optimal(problem, feasible_choice(problem, prices), prices, self.time_limit)
