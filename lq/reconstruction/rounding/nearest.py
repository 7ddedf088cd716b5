"""Rounding to the nearest level: nothing is learned of it."""

from dataclasses import dataclass

from torch import Tensor

from lq.reconstruction.rounding.grid import WeightGrid
from lq.reconstruction.rounding.rounding import Rounding


@dataclass(frozen=True)
class Nearest(Rounding):
    """The level nearest to each weight."""

    lr: float | None = None

    def begin(self, grid: WeightGrid) -> "_Fixed":
        """Round."""
        return _Fixed(grid)


class _Fixed:
    def __init__(self, grid: WeightGrid) -> None:
        self.parameters: list[Tensor] = []
        self._levels = grid.nearest()

    def advance(self, done: float) -> None:
        """Nothing changes."""

    def levels(self) -> Tensor:
        return self._levels

    def penalty(self) -> None:
        return None

    def hard_levels(self) -> Tensor:
        return self._levels
