"""What holds learned widths down: a target for each tensor, or one budget for all."""

import torch
from torch import Tensor

from lq.quantizer.rounding import on_host

#: Channels below this width, in bits, are pruned.
PRUNED = 0.5

# What a width may exceed an integer by and still become that integer.
_SLACK = 0.1
#: Least width of what cannot be pruned, and largest that is learned, in bits.
LEAST, _MOST = 1.0, 8.0
#: How far a width may be above its target, in bits, and count as arrived.
WITHIN = 1e-3


class Targets:
    """A width for each tensor: ``relu(width - target)``, averaged over weights and over activations."""

    def __init__(self, target: Tensor, is_weight: Tensor, start: Tensor) -> None:
        self.target, self.is_weight, self.start = target, is_weight, start

    def met(self, bits: Tensor) -> bool:
        """Whether no width exceeds its target."""
        return not bool((bits > self.target + WITHIN).any())

    def gradient(self, bits: Tensor) -> Tensor:
        """Of the mean excess to each width."""
        over = (bits > self.target - WITHIN).float()
        violated = over.sum()
        gradient = torch.zeros_like(bits)
        for kind in (self.is_weight, ~self.is_weight):
            mine = over * kind
            gradient += mine * ((mine.sum() + WITHIN) / (violated + WITHIN)) / kind.sum().clamp(min=1)
        return gradient

    def project(self, progress: float, bits: Tensor) -> Tensor:
        """The widths, as far as they are allowed after a share of the way."""
        top = torch.maximum(self.start, self.target)
        left = (1 - progress) ** 2  # the last bits are the dearest: they go slowest
        return torch.minimum(bits, (self.target + (top - self.target) * left).nan_to_num(float("inf")))

    def integers(self, bits: Tensor) -> Tensor:
        """Integer widths for the learned ones."""
        return torch.minimum(_upward(bits), self.target.nan_to_num(float("inf")))


class SizeBudget:
    """One budget for all: the excess of ``sum(cost * width)`` over a limit.

    Args:
        costs: what a bit of each width costs, in units of the limit; shape (steps,).
        limit: for the sum.
        activations: targets of the widths that cost nothing.
        start: widths at the start.
    """

    def __init__(self, costs: Tensor, limit: float, activations: Targets, start: Tensor) -> None:
        self.costs, self.limit, self.others, self.start = costs, limit, activations, start

    def total(self, bits: Tensor) -> Tensor:
        """What the widths cost; shape (), float64."""
        return (self.costs.double() * bits.double()).sum()

    def met(self, bits: Tensor) -> bool:
        """Whether the widths are within the budget, and the others at their targets."""
        return bool(self.total(bits) <= self.limit * (1 + 1e-6)) and self.others.met(bits)

    def gradient(self, bits: Tensor) -> Tensor:
        """Of the relative excess of the budget, and of the others' mean excess."""
        over = torch.where(self.total(bits) > self.limit, self.costs / self.limit, 0.0)
        return over * self.start.max() + self.others.gradient(bits)

    def project(self, progress: float, bits: Tensor) -> Tensor:
        """The widths, plus or minus what all have to take alike to cost what is allowed after a share of the way."""
        begin = self.total(self.start).clamp(min=self.limit)
        allowed = self.limit + (begin - self.limit) * (1 - progress) ** 2
        held = self.others.project(progress, bits)
        for _ in range(20):  # widths stop at 0 and 8 bits, so that the rest has to take more
            missing = allowed - self.total(held)
            moves = self.costs * ((held > 0) & ((held < _MOST) | (missing <= 0)))
            moves = moves * (missing.abs() > 1e-6 * self.limit)
            if on_host(held) and not bool(moves.any()):  # elsewhere the rest changes nothing, and nobody waits
                break
            held = torch.where(moves > 0, (held + missing / moves.sum()).clamp(0.0, _MOST), held)
        return held

    def integers(self, bits: Tensor) -> Tensor:
        """Integer widths within the budget: down, and up again where most was lost, as far as the budget goes."""
        costly = self.costs > 0
        whole = torch.where(costly, bits.floor(), self.others.integers(bits))
        left = self.limit * (1 + 1e-6) - self.total(whole)
        order = torch.where(costly, bits - whole, -1.0).argsort(descending=True)
        fits = torch.cumsum(self.costs[order].double(), 0) <= left
        up = order[fits & costly[order] & (bits - whole > _SLACK)[order] & (whole < _MOST)[order]]
        whole[up] += 1
        return whole


def _upward(bits: Tensor) -> Tensor:
    """The least integers that are no smaller, but for a slack; 0 where pruned."""
    return torch.where(bits < PRUNED, 0.0, (bits - _SLACK).ceil().clamp(min=1.0))
