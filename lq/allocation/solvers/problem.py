r"""The problem every allocation is: one option per item, least total loss, every total cost within its limit.

``min sum_i losses[i, x_i]`` subject to ``sum_i costs[c, i, x_i] <= limits[c]`` for all ``c``: a knapsack with multiple
choices and several constraints. Plain numbers in, one option per item out; what items and costs are is not known here.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lq.errors import BudgetError, SpecError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: A total may exceed its limit by this share: sums of the same numbers in another order differ by less.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Solution:
    """One option per item, and how good it is.

    Args:
        choice: the option of each item, shape (items,).
        loss: their total loss.
        costs: their total costs, shape (constraints,).
        bound: no choice within the limits has a total loss below this.
    """

    choice: Ints
    loss: float
    costs: Floats
    bound: float

    @property
    def gap(self) -> float:
        """Largest share of the bound by which the loss may exceed the optimum; 0 when it is proved optimal."""
        if self.loss <= self.bound:
            return 0.0
        return (self.loss - self.bound) / abs(self.bound) if self.bound else np.inf


@dataclass(frozen=True, eq=False)
class Problem:
    """A knapsack with multiple choices and several constraints.

    Args:
        losses: shape (items, options); ``inf`` marks an option that does not exist.
        costs: shape (constraints, items, options), not negative; those of options that do not exist are not read.
        limits: greatest total of each cost, shape (constraints,); ``inf`` is no limit.
        names: what messages call the constraints; empty: "cost 0", "cost 1", ...

    Raises:
        SpecError: for shapes that do not fit, NaN, ``-inf``, negative costs or limits, items without an option.

    >>> problem = Problem(losses=[[3, 1], [5, 0]], costs=[[[1, 4], [1, 4]]], limits=[5])
    >>> problem.least_costs, problem.greatest_costs
    (array([2.]), array([8.]))
    """

    losses: Floats
    costs: Floats
    limits: Floats
    names: tuple[str, ...] = ()
    exists: NDArray[np.bool_] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        losses, costs, limits = (_array(getattr(self, name), name) for name in ("losses", "costs", "limits"))
        if losses.ndim != 2 or not losses.size:
            raise SpecError(
                f"losses of shape {losses.shape} are no problem; use (items, options), at least one of each"
            )
        if costs.ndim != 3 or costs.shape[1:] != losses.shape:
            raise SpecError(
                f"costs of shape {costs.shape} do not fit losses of shape {losses.shape}; "
                "use (constraints, items, options)"
            )
        if limits.shape != costs.shape[:1]:
            raise SpecError(f"limits of shape {limits.shape} do not fit {len(costs)} costs; use one limit for each")
        names = self.names or tuple(f"cost {c}" for c in range(len(costs)))
        if len(names) != len(costs):
            raise SpecError(f"{len(names)} names were given for {len(costs)} costs; use one for each, or none")
        if np.isnan(losses).any() or (losses == -np.inf).any():
            raise SpecError("losses have NaN or -inf; use finite numbers, and inf for options that do not exist")
        exists = losses < np.inf
        if not exists.any(1).all():
            raise SpecError(f"item {int(exists.any(1).argmin())} has no option: all of its losses are inf; give it one")
        costs = np.where(exists, costs, 0.0)
        if not (np.isfinite(costs) & (costs >= 0)).all():
            raise SpecError("costs of existing options must be finite and not negative")
        if not (limits >= 0).all():
            raise SpecError(f"limits={limits.tolist()} have NaN or negative entries; use numbers from 0 on, or inf")
        for name, value in zip(("losses", "costs", "limits", "exists"), (losses, costs, limits, exists), strict=True):
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "names", names)

    @property
    def least_costs(self) -> Floats:
        """The least total of each cost alone, shape (constraints,)."""
        least: Floats = np.where(self.exists, self.costs, np.inf).min(2).sum(1)
        return least

    @property
    def greatest_costs(self) -> Floats:
        """The greatest total of each cost alone, shape (constraints,)."""
        greatest: Floats = self.costs.max(2).sum(1)
        return greatest

    @property
    def ceilings(self) -> Floats:
        """The limits plus the rounding of a sum, shape (constraints,): what totals are compared with."""
        return self.limits * (1 + ROUNDING)

    def totals(self, choice: Ints) -> Floats:
        """Total of each cost, shape (constraints,)."""
        totals: Floats = self.costs[:, np.arange(len(choice)), choice].sum(1)
        return totals

    def loss(self, choice: Ints) -> float:
        """Total loss."""
        return float(self.losses[np.arange(len(choice)), choice].sum())

    def meets(self, choice: Ints) -> bool:
        """Whether the choice is within all limits."""
        return bool((self.totals(choice) <= self.ceilings).all())

    def solution(self, choice: Ints, bound: float) -> Solution:
        """The choice with its loss and costs; a bound above the loss is rounding, and becomes the loss."""
        loss = self.loss(choice)
        return Solution(choice, loss, self.totals(choice), min(bound, loss))

    def limited(self, constraint: int, limit: float) -> "Problem":
        """This problem with another limit for one of its costs."""
        limits = self.limits.copy()
        limits[constraint] = limit
        return replace(self, limits=limits)

    def check_limits(self) -> None:
        """Check that each limit can be met, were it the only one.

        Raises:
            BudgetError: for limits below the least total of their cost.
        """
        least, greatest = self.least_costs, self.greatest_costs
        missed = [
            f"{self.names[c]} <= {self.limits[c]:.15g} is asked for, feasible are {least[c]:.15g} to {greatest[c]:.15g}"
            for c in np.flatnonzero(least > self.ceilings)
        ]
        if missed:
            raise BudgetError(f"no allocation meets the budgets: {'; '.join(missed)}; raise the limits or add options")


def _array(values: ArrayLike, name: str) -> Floats:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{name} are no array of numbers: {error}; use equal rows, with inf where an option is missing"
        ) from error
