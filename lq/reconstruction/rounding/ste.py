r"""Straight-through: learn the weights themselves, rounded to the nearest level in each step.

``w~ = s * clamp(round((w + d) / s), low, high)``; what is learned is the change d, in the unit of the weights and 0 at
the start. Its gradient is that of ``w~`` where the weight lies within the grid, else 0 (lq.quantizer.functional). The
rounding is hard throughout: there is no penalty and nothing to decide in the end, and a weight may move by more than
one level. The learning rate falls to 0 as a cosine, so that weights near the middle of two levels come to rest.

Source: GLF-Q (2026): Adam with 2e-5 for the weights and 2e-4 for the steps of activations, 3 000 iterations of a unit,
without drop. Deviates: both rates grow for fewer iterations, and the cosine is this project's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.rounding.grid import WeightGrid
from lq.reconstruction.rounding.rounding import Rates, Rounding


@dataclass(frozen=True)
class StraightThrough(Rounding):
    """Rounding to the nearest level of weights that move.

    Args:
        lr: learning rate of the weights, for Adam; None: by the number of iterations, 2e-5 for 3 000.
    """

    lr: float | None = None
    rates: ClassVar[Rates] = Rates(2e-5, 2e-4, 3_000)
    falls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise SpecError(f"StraightThrough(lr={self.lr}): the learning rate must be positive")

    def begin(self, grid: WeightGrid) -> "_Moved":
        """Start at the float weights."""
        return _Moved(grid)


class _Moved:
    def __init__(self, grid: WeightGrid) -> None:
        self.grid = grid
        self.change = torch.zeros_like(grid.values).requires_grad_()
        self.parameters: list[Tensor] = [self.change]

    def advance(self, done: float) -> None:
        """Nothing changes."""

    def levels(self) -> Tensor:
        inside = self.grid.clamp(self.grid.values + self.change / self.grid.step)
        # the difference is exactly 0: the values are those of the levels, the gradient that of what is inside
        return self.grid.nearest(inside.detach()) + (inside - inside.detach())

    def penalty(self) -> None:
        return None

    def hard_levels(self) -> Tensor:
        return self.levels().detach()
