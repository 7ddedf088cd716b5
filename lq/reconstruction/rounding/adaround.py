r"""AdaRound: learn for each weight whether to round it up or down.

``w~ = s * clamp(floor(w / s) + h(V), low, high)`` with the rectified sigmoid ``h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0,
1)``, whose ends 0 and 1 are reached. V starts where ``h(V)`` is the fraction of the weight, so that the soft weights
are the float ones. A penalty ``lambda * sum(1 - |2h - 1|^beta)`` drives h to its ends: it is left out for the first
fifth of the iterations, then beta falls from 20 (weights near an end feel it) to 2 (all do), linearly.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, equations 22 to 24;
constants as in MRECG's supplement, section 6.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.rounding.grid import WeightGrid
from lq.reconstruction.rounding.rounding import Rounding

Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True)
class AdaRound(Rounding):
    """Rounding up or down, by a rectified sigmoid.

    Args:
        penalty: lambda, weight of the penalty; 0.01, for MobileNets 0.1.
        beta: exponent of the penalty at its start and at its end.
        warmup: share of the iterations before the penalty starts.
        schedule: how beta goes from start to end: "linear" or "cosine".
        lr: learning rate of V, for Adam; None: by the number of iterations, 1e-3 for 20 000.
    """

    penalty: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    schedule: Schedule = "linear"
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise SpecError(f"schedule={self.schedule!r} is unknown; use one of {get_args(Schedule)}")
        if (
            self.penalty < 0
            or not 0 <= self.warmup < 1
            or (self.lr is not None and self.lr <= 0)
            or min(self.beta) <= 0
        ):
            raise SpecError(
                f"AdaRound(penalty={self.penalty}, beta={self.beta}, warmup={self.warmup}, lr={self.lr}): the penalty "
                "must not be negative, beta and lr must be positive, and warmup a share in [0, 1)"
            )

    def begin(self, grid: WeightGrid) -> "_UpOrDown":
        """Start at the float weights."""
        return _UpOrDown(self, grid)

    def exponent(self, done: float) -> float | None:
        """Beta after a share `done` of the iterations; None: no penalty yet."""
        if done < self.warmup or not self.penalty:
            return None
        start, end = self.beta
        way = (done - self.warmup) / (1 - self.warmup)
        if self.schedule == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return start + (end - start) * way


class _UpOrDown:
    def __init__(self, rule: AdaRound, grid: WeightGrid) -> None:
        self.rule, self.grid = rule, grid
        values = grid.values - grid.offset
        floor = values.floor()
        self._floor = floor + grid.offset
        self.v = torch.logit((values - floor + 0.1) / 1.2).requires_grad_()
        self.parameters: list[Tensor] = [self.v]
        self._exponent: float | None = None
        self._soft: Tensor | None = None

    def advance(self, done: float) -> None:
        self._exponent = self.rule.exponent(done)

    def levels(self) -> Tensor:
        self._soft = torch.sigmoid(self.v).mul(1.2).sub(0.1).clamp(0, 1)
        return self.grid.clamp(self._floor + self._soft)

    def penalty(self) -> Tensor | None:
        if self._exponent is None or self._soft is None:
            return None
        return (self._soft.numel() - (2 * self._soft - 1).abs().pow(self._exponent).sum()) * self.rule.penalty

    def hard_levels(self) -> Tensor:
        return self.grid.clamp(self._floor + (self.v.detach() >= 0))
