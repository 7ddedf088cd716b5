"""What the widths of items count towards budgets: tables of costs for the knapsack, and what is left of each limit."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lq.allocation.budget import Budget, Costs, parse_budget
from lq.allocation.solvers import Problem
from lq.allocation.solvers import solver as solver_of
from lq.allocation.solvers.products import Pair
from lq.errors import BudgetError, DataError, NoEffectWarning, SpecError
from lq.sensitivity.table import TensorSensitivity
from lq.structure.patterns import select

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Choice:
    """One choice of a width: a tensor, or a group of its channels."""

    tensor: TensorSensitivity
    channels: slice | None  # None: all
    share: float  # of the tensor's values
    losses: Array


@dataclass(frozen=True, eq=False)
class Limit:
    """A budget; what each item's widths, and products of two, count towards it; what counts whatever is chosen."""

    budget: Budget
    table: Array
    fixed: float
    of: str = ""
    pairs: tuple[Pair, ...] = ()

    @property
    def name(self) -> str:
        """The budget in words."""
        return f"{self.budget.show(self.budget.cost_limit)} {self.of}".strip()

    @property
    def left(self) -> float:
        """The limit for the items."""
        return max(self.budget.cost_limit - self.fixed, 0.0)

    def show(self, cost: float) -> str:
        """A total of the items, in the unit of the budget."""
        return self.budget.show(cost + self.fixed)

    def check(self, least: float, greatest: float) -> None:
        """Raise if the budget cannot be met; totals of the items are given."""
        if self.fixed + least > self.budget.cost_limit * (1 + 1e-12):
            raise BudgetError(
                f"the budget of {self.name} cannot be met: with the widths that are allowed, feasible are "
                f"{self.show(least)} to {self.show(greatest)}; give more, or allow smaller widths"
            )


class Counting:
    """What each item's widths count for.

    Args:
        items: what is chosen.
        costs: of the model.
        widths: in bits, (W,).
        joint: whether activations of one sample count like weights.
    """

    def __init__(self, items: Sequence[Choice], costs: Costs, widths: Array, joint: bool) -> None:
        self.items = items
        self.costs = costs
        self.widths = widths
        self.joint = joint

    def table(self, budget: Budget) -> Array:
        """Costs of each item at each width, (items, W), in the unit of the budget's limit; the rest's is in `fixed`."""
        if budget.kind in ("bits", "compression"):
            return self.mean_bits("weight")
        if budget.kind == "bytes":
            return np.stack([self._stored(item) * item.share * self.widths / 8 for item in self.items])
        if budget.kind == "latency":
            return self._latencies(budget)
        if budget.kind == "bitops":
            return self._bit_operations()
        raise SpecError(f"nothing is known of the costs of a budget of {budget.kind}")

    def fixed(self, budget: Budget) -> float:
        """What is not up to the items."""
        if budget.kind == "bytes":
            layers = {item.tensor.name for item in self.items if item.tensor.role == "weight"}
            channels = sum(item.tensor.channels for item in self.items if item.channels and item.channels.start == 0)
            kept = sum(
                t.numel * t.bits / 8 for t in self.costs.tensors.values() if t.role == "weight" and t.name not in layers
            )
            return self.costs.overhead + kept + len(layers) + channels / 2  # whole bytes; which width a channel has
        if budget.kind == "bitops":
            chosen = {item.tensor.name for item in self.items}
            return sum(
                p.macs * self.costs.bits(p.left) * self.costs.bits(p.right)
                for p in self.costs.products
                if not {p.left, p.right} & chosen
            )
        return 0.0

    def mean_bits(self, role: Literal["weight", "activation"]) -> Array:
        """Shares of a mean width; of weights that are stored in integers, with activations if they are joint."""
        sizes = np.array(
            [
                self._stored(item) * item.share if role == "weight" else item.tensor.numel * (item.tensor.role == role)
                for item in self.items
            ],
            dtype=float,
        )
        found: Array = sizes[:, None] * self.widths / max(sizes.sum(), 1.0)
        return found

    def _stored(self, item: Choice) -> float:
        if item.tensor.role == "activation":
            return float(item.tensor.numel) if self.joint else 0.0
        return float(self.costs.tensors[item.tensor.name].numel)

    def _bit_operations(self) -> Array:
        chosen = {item.tensor.name for item in self.items}
        factors: dict[str, float] = {}
        for product in self.costs.products:
            mine = {product.left, product.right} & chosen
            if len(mine) == 1:
                name = str(mine.pop())
                other = product.left if name == product.right else product.right
                factors[name] = factors.get(name, 0.0) + product.macs * self.costs.bits(other)
        if not any(product.macs for product in self.costs.products):
            raise DataError("no operations were counted; run lq.calibrate(model, batches) first")
        return np.stack([factors.get(i.tensor.name, 0.0) * i.share * self.widths for i in self.items])

    def pairs(self, budget: Budget) -> tuple[Pair, ...]:
        """Items whose widths multiply: weight and input, or two activations, that are both allocated."""
        if budget.kind != "bitops":
            return ()
        rows: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            rows.setdefault(item.tensor.name, []).append(i)
        found = []
        for product in self.costs.products:
            for one in rows.get(str(product.left), []):
                for other in rows.get(str(product.right), []):
                    share = self.items[one].share * self.items[other].share
                    found.append(Pair(one, other, product.macs * share))
        return tuple(found)

    def _latencies(self, budget: Budget) -> Array:
        table = budget.table or {}
        known = {self.costs.tensors[i.tensor.name].layer for i in self.items if i.tensor.role == "weight"}
        select(list(table), known, argument="latency table")
        left = sorted(known - set(table))
        if left:
            warnings.warn(
                f"the latency table has no rows for {len(left)} of {len(known)} layers, which cost nothing "
                f"({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})",
                NoEffectWarning,
                stacklevel=5,
            )
        inputs = {p.right: int(self.costs.bits(p.left)) for p in self.costs.products}
        found = np.zeros((len(self.items), len(self.widths)))
        for row, item in zip(found, self.items, strict=True):
            layer = self.costs.tensors[item.tensor.name].layer
            if item.tensor.role == "activation" or layer not in table:
                continue
            if item.channels is not None:
                raise SpecError("a latency table has one width per layer; use granularity='layer'")
            times = table[layer]
            given = inputs.get(item.tensor.name)
            row[:] = [times.get((int(b), given), times.get((int(b), None), np.nan)) for b in self.widths]
        return found

    def without_missing(self, losses: Array, limits: Sequence[Limit]) -> Array:
        """Delete the widths that a latency table does not have."""
        for limit in limits:
            losses = np.where(np.isnan(limit.table), np.inf, losses)
        for item, row in zip(self.items, losses, strict=True):
            if not np.isfinite(row).any():
                raise SpecError(
                    f"no width is left for {item.tensor.name}: bits=, pins= and the latency table have none in common"
                )
        return losses

    def within_memory(self, losses: Array, limit: str | float) -> Array:
        """Delete the widths with which a layer or activation exceeds `limit`, RDO-Q's cap.

        Where channels have widths of their own, these are capped at what the layer alone would choose with all of the
        memory: with more left for others no channel would get more.
        """
        parsed = parse_budget(limit if isinstance(limit, str) else f"{limit}B")
        if parsed.kind != "bytes":
            raise SpecError(f"layer_memory={limit!r} is no size; use bytes such as '64kB'")
        losses = losses.copy()
        for name in dict.fromkeys(item.tensor.name for item in self.items):
            rows = [i for i, item in enumerate(self.items) if item.tensor.name == name]
            sizes = np.stack([self.items[i].tensor.numel * self.items[i].share * self.widths / 8 for i in rows])
            problem = Problem(losses[rows], sizes[None], np.array([parsed.limit]))
            least = float(problem.least_costs[0])
            if least > parsed.limit:
                raise BudgetError(
                    f"layer_memory={limit!r} cannot hold {name}: with the widths it may have it takes {least:.0f} to "
                    f"{float(problem.greatest_costs[0]):.0f} bytes"
                )
            chosen = sizes[np.arange(len(rows)), solver_of("greedy")(problem).choice]
            losses[rows] = np.where(sizes > chosen[:, None] * (1 + 1e-9), np.inf, losses[rows])
        return losses
