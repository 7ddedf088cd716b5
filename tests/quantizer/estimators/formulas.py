"""Gradients of a quantized tensor, by scalar float64 loops over the formulas of the papers: the oracle of the tests."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """One row of values that share a step, and the gradient that arrives at each."""

    values: list[float]
    grads: list[float]
    step: float
    low: float
    high: float
    offset: float = 0.0

    def levels(self) -> Iterator[tuple[float, float, float]]:
        """Gradient, ``v = x / s`` and its rounded and clamped level, value by value."""
        for x, g in zip(self.values, self.grads, strict=True):
            v = x / self.step
            yield g, v, min(max(round(v - self.offset) + self.offset, self.low), self.high)

    def inside(self, v: float) -> bool:
        return self.low < v < self.high

    def straight_through(self) -> list[float]:
        return [g if self.inside(v) else 0.0 for g, v, _ in self.levels()]

    def step_gradient(self) -> float:
        """``dL/d(log2 s)`` by LSQ's equation 3."""
        total = 0.0
        for g, v, q in self.levels():
            total += g * (q - v) if self.inside(v) else g * (self.low if v <= self.low else self.high)
        return total * self.step * math.log(2)

    def above(self) -> float:
        """``dL/d(high)``: the step for every value above the grid.

        Between integer widths a value beyond a bound may still be nearer to the level before it; it counts for both
        bounds, by where that level lies between them.
        """
        outside = ((g, q) for g, v, q in self.levels() if not self.inside(v))
        return sum(g * self.step * (q - self.low) / (self.high - self.low) for g, q in outside)

    def below(self) -> float:
        """``dL/d(low)``: the step for every value below the grid."""
        return sum(g * self.step for g, v, _ in self.levels() if not self.inside(v)) - self.above()


def rows(x: Tensor, grad: Tensor, log2_step: Tensor, low: Tensor, high: Tensor, offset: Tensor) -> list[Case]:
    """The rows of ``x``, (C, N), each with its own grid."""
    grids = zip(*(t.double().expand(len(x)).tolist() for t in (log2_step.exp2(), low, high, offset)), strict=True)
    return [Case(v.double().tolist(), g.double().tolist(), *grid) for v, g, grid in zip(x, grad, grids, strict=True)]


def values(
    channels: int, count: int, steps: Tensor, offset: Tensor, reach: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Values an eighth of a step or more from every level, tie and bound, and gradients for them; (C, N) each."""
    generator = torch.Generator().manual_seed(seed)
    fraction = torch.randint(1, 4, (channels, count), generator=generator) / 8
    sign = torch.randint(0, 2, (channels, count), generator=generator) * 2 - 1
    whole = torch.randint(-reach, reach, (channels, count), generator=generator)
    x = (whole + fraction * sign + offset.view(-1, 1)) * steps.view(-1, 1)
    return x, torch.randn(channels, count, generator=generator)


def by_row(cases: list[Case], function: Callable[[Case], float]) -> Tensor:
    """A function of each row, as a float32 tensor."""
    return torch.tensor([function(case) for case in cases])
