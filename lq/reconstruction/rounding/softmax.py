r"""NWQ's annealing softmax: learn for each weight which of several integers to add to its floor.

``w~ = s * clamp(floor(w / s) + h(V), low, high)`` with ``h(V) = sum_k o_k * softmax(V / tau)_k``, the expectation of
the offsets o. The temperature tau falls exponentially until the softmax is one-hot: no penalty is needed. V starts
where the expectation is the fraction of the weight.

Source: Wang et al., NWQ (poster): the formula, and that wider sets of offsets overfit small calibration sets. It does
not state the schedule of tau; 1 to 0.01 is this project's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.rounding.grid import WeightGrid
from lq.reconstruction.rounding.rounding import Rounding

# Fractions are kept this far from the ends of the set, where the softmax would be one-hot from the start.
_MARGIN = 2e-7


@dataclass(frozen=True)
class AnnealingSoftmax(Rounding):
    """Rounding by a softmax over integer offsets, ever colder.

    Args:
        offsets: integers to add to the floor; must hold 0 and 1.
        temperature: tau at the start and at the end.
        lr: learning rate of V, for Adam; None: by the number of iterations, 1e-3 for 20 000.
    """

    offsets: Sequence[int] = (0, 1)
    temperature: tuple[float, float] = (1.0, 0.01)
    lr: float | None = None

    def __post_init__(self) -> None:
        if not {0, 1} <= set(self.offsets) or len(set(self.offsets)) != len(self.offsets):
            raise SpecError(
                f"offsets={self.offsets}: expected distinct integers with 0 and 1 among them, as (-1, 0, 1, 2)"
            )
        if min(self.temperature) <= 0 or (self.lr is not None and self.lr <= 0):
            raise SpecError(f"temperature={self.temperature}, lr={self.lr}: all must be positive")

    def begin(self, grid: WeightGrid) -> "_Offsets":
        """Start at the float weights."""
        return _Offsets(self, grid)


class _Offsets:
    def __init__(self, rule: AnnealingSoftmax, grid: WeightGrid) -> None:
        self.rule, self.grid = rule, grid
        values = grid.values - grid.offset
        floor = (values + 1e-4).floor()  # levels that were written are what they were to a rounding error
        self._floor = floor + grid.offset
        self._offsets = torch.tensor(sorted(rule.offsets), dtype=torch.float32, device=floor.device).view(-1, 1)
        self._tau = rule.temperature[0]
        self.v = (self._start((values - floor).clamp(min=0)) * self._tau).requires_grad_()
        self.parameters: list[Tensor] = [self.v]

    def _start(self, fraction: Tensor) -> Tensor:
        """Logits, shape (K, W), whose expectation is `fraction`; the likelier, the nearer an offset is."""
        low, high = min(self.rule.offsets), max(self.rule.offsets)
        fraction = fraction.clamp(low + _MARGIN, high - _MARGIN)
        if len(self._offsets) == 2:
            logit = torch.logit(fraction)
            return torch.stack([-logit / 2, logit / 2])
        offsets = self._offsets.double()
        logits = -2.0 * (offsets - fraction).square()
        for _ in range(30):  # Newton: the derivative of the expectation by a tilt is the variance
            p = logits.softmax(0)
            mean = (p * offsets).sum(0)
            variance = (p * (offsets - mean).square()).sum(0)
            logits = logits + offsets * ((fraction - mean) / variance.clamp(min=1e-9)).clamp(-2, 2)
        return logits.float()

    def advance(self, done: float) -> None:
        start, end = self.rule.temperature
        self._tau = start * (end / start) ** done

    def levels(self) -> Tensor:
        expected = ((self.v / self._tau).softmax(0) * self._offsets).sum(0)
        return self.grid.clamp(self._floor + expected)

    def penalty(self) -> None:
        return None

    def hard_levels(self) -> Tensor:
        return self.grid.clamp(self._floor + self._offsets.view(-1)[self.v.detach().argmax(0)])
