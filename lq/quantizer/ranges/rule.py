"""What range rules have in common: the levels of a grid, and how a range becomes step and zero point.

Rules see every tensor as `Samples`: values of shape (C, N), one row per channel. A rule answers with a range ``low,
high`` of shape (C,).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: Smallest step: keeps ``1 / step`` finite in float32 and half a step representable.
MIN_STEP = 2.0**-100


@dataclass(frozen=True)
class Samples:
    """The values a grid will represent.

    Args:
        values: shape (C, N), one row per channel.
        counts: how often each value occurs, shape (N,); None: once.
        sizes: root mean square of the token or sample that a value comes from, shape (N,); None: unknown.
    """

    values: Tensor
    counts: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def low(self) -> Tensor:
        """Smallest value of each channel, shape (C,)."""
        return self.values.amin(1)

    @property
    def high(self) -> Tensor:
        """Largest value of each channel, shape (C,)."""
        return self.values.amax(1)

    def error_weights(self, p: float, *, relative: bool = True) -> Tensor | None:
        """How much an error to the power `p` of each value counts, shape (N,), sum 1; None: all the same.

        As often as the value occurs; if relative, over the power of its size too, at least the median.
        """
        if self.counts is None:
            return None
        weights = self.counts.double()
        if relative and self.sizes is not None:
            ordered, order = self.sizes.sort()
            share = weights[order].cumsum(0) / weights.sum()
            median = ordered[int((share < 0.5).sum())]
            weights = weights * torch.maximum(self.sizes, median).double() ** -p
        return (weights / weights.sum()).to(self.values.dtype)


class RangeRule(Protocol):
    """Picks the clipping range of a grid from the values it will represent."""

    def __call__(self, samples: Samples, levels: "Levels") -> tuple[Tensor, Tensor]:
        """Return ``low, high`` of shape (C,)."""
        ...


@dataclass(frozen=True)
class Levels:
    """The levels of C grids before their range is known.

    Args:
        bits: widths, shape (C,), float.
        symmetric: the zero point is fixed by the grid, not by the range.
        signed: values have both signs.
        power_of_two: steps are rounded to powers of two.
    """

    bits: Tensor
    symmetric: bool
    signed: bool
    power_of_two: bool = False

    @property
    def zero_is_free(self) -> bool:
        """Whether the zero point follows the range."""
        return self.signed and not self.symmetric

    @property
    def top(self) -> Tensor:
        """Highest code, ``2**bits - 1``; shape (C,)."""
        return torch.exp2(self.bits) - 1

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point, shape (C,) each, of the grids that cover ``[low, high]``.

        Zero is always a level (but for symmetric two-level grids, which are ``-s/2, +s/2``).
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        top = self.top
        if not self.signed:
            zero_point, step = torch.zeros_like(top), high / top
        elif self.symmetric:
            zero_point = torch.where(self.bits == 1, 0.5, torch.exp2(self.bits - 1).where(self.bits > 0, 0.0))
            step = torch.maximum(high / (top - zero_point), -low / zero_point)
        else:
            step = (high - low) / top
            zero_point = torch.nan_to_num(-low / step.clamp(min=MIN_STEP)).round().clamp(min=0).minimum(top)
        step = torch.where(torch.isfinite(step) & (step > MIN_STEP), step, self._without_range())
        if self.power_of_two:
            step = torch.exp2(torch.log2(step).round())
        return step, zero_point

    def _without_range(self) -> Tensor:
        """Steps of rows that are all zero: any will do where zero is a level; two levels around it have to be close."""
        return torch.where((self.bits == 1) & (self.symmetric and self.signed), MIN_STEP, torch.ones_like(self.bits))

    def dequantized(self, values: Tensor, step: Tensor, zero_point: Tensor, out: Tensor | None = None) -> Tensor:
        """`values` (C, N) rounded to the grids; written into `out` if given."""
        half = zero_point.frac().unsqueeze(1)
        out = torch.mul(values, (1 / step).unsqueeze(1), out=out)
        halves = self.symmetric and (values.device.type != "cpu" or bool(half.any()))  # a GPU would be waited for
        out = out.sub_(half).round_().add_(half) if halves else out.round_()
        out.clamp_(-zero_point.unsqueeze(1), (self.top - zero_point).unsqueeze(1))
        return out.mul_(step.unsqueeze(1))
