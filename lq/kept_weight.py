"""Quantized weights between two forwards: kept while nothing changes, and changed where code writes into them.

A kept weight must never be stale. Writes that autograd counts change the version of a tensor; writes through ``.data``
(averages that are swapped in, merged adapters) do not, so that the float weight itself is looked at each time: its
product with a fixed random vector, row by row, costs one read of it. Where that is not exact (half precision) or would
have to be waited for (other devices than the CPU), nothing is kept.

Code outside of a forward may read ``layer.weight`` and write into it, as it would with a float one. What it was given
is remembered until the weight is next used, and a difference is taken over into the float weight.
"""

import sys
from typing import Any, Protocol

import torch
from torch import Tensor

# Frames between a weight's quantizer and who reads the weight.
_MACHINERY = ("torch.nn.utils.parametrize", "torch.nn.modules.module", "lq.weight_quantizer", "lq.kept_weight")

_VECTORS: dict[tuple[int, torch.dtype], Tensor] = {}


class Grid(Protocol):
    """What a weight is rounded to."""

    log2_step: Tensor
    zero_point: Tensor
    bits: Tensor


class KeptWeight:
    """A rounded weight, and what it was rounded from.

    Args:
        weight: the float weight.
        grid: its quantizer.
        rounded: what became of it.
    """

    def __init__(self, weight: Tensor, grid: Grid, rounded: Tensor) -> None:
        self.rounded = rounded
        self._versions = _versions(weight, grid)
        self._rows = _rows(weight)
        self._log2_step = grid.log2_step.detach().clone()

    def is_of(self, weight: Tensor, grid: Grid) -> bool:
        """Whether `weight` and `grid` are still what they were."""
        if self._rows is None or self._versions != _versions(weight, grid):
            return False
        rows = _rows(weight)
        return rows is not None and torch.equal(rows, self._rows) and torch.equal(grid.log2_step, self._log2_step)


class WrittenWeight:
    """A rounded weight that code outside of a forward was given, and may write into.

    Args:
        weight: the float weight.
        rounded: what was given.
    """

    def __init__(self, weight: Tensor, rounded: Tensor) -> None:
        self.weight = weight
        self._rounded = rounded
        self._before = rounded.detach().clone()

    @torch.no_grad()
    def take_over(self, half_step: Tensor) -> bool:
        """Change the float weight as the rounded one was changed; returns whether that was.

        What was added to a value is added to the float one, so that merging an adapter and taking it out again gives
        back the float weight. A value that was overwritten becomes what was written, to half a step. What is zero in a
        row (along dimension 0) that was written to is zero.

        Args:
            half_step: of the grid, shaped like the weight. Rounding errors beyond it, of clipped values, are let go.
        """
        now = self._rounded.detach()
        if now.shape != self._before.shape or torch.equal(now, self._before):
            return False
        now = now.to(self.weight)
        error = self.weight - self._before
        keeps_error = (now != 0) & (error.abs() <= half_step * 1.001)
        changed = (now != self._before).flatten(1).any(1).view(-1, *[1] * (now.ndim - 1))  # rows of it
        self.weight.copy_(torch.where(changed, torch.where(keeps_error, now + error, now), self.weight))
        return True


def can_be_kept(weight: Tensor) -> bool:
    """Whether it can be told cheaply that a weight is what it was."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64) and weight.ndim > 1


def read_outside_of_forwards() -> bool:
    """Whether code that reads ``layer.weight`` is calling lq, and no module runs: it may write into what it gets."""
    frame, attribute = sys._getframe(1), False
    while frame is not None and (name := frame.f_globals.get("__name__")) in _MACHINERY:
        attribute |= name == "torch.nn.utils.parametrize"
        frame = frame.f_back  # type: ignore[assignment]
    if not attribute or frame is None or frame.f_code.co_name == "forward":
        return False
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return True


def _versions(weight: Tensor, grid: Grid) -> tuple[Any, ...]:
    """Changes with what autograd sees; tensors made in inference mode have no version, and never match."""
    return tuple(
        object() if t.is_inference() else (t.data_ptr(), t._version, t.dtype, t.device, t.shape)
        for t in (weight, grid.log2_step, grid.zero_point, grid.bits)
    )


def _rows(weight: Tensor) -> Tensor | None:
    """A number for each row of a weight that changes with any of its values; None: not to be had cheaply."""
    if not can_be_kept(weight):
        return None
    plain = weight.detach()
    if not plain.is_contiguous():
        plain = plain.movedim(1, -1)  # as channels_last lies in memory
        if not plain.is_contiguous():
            return None
    table = plain.reshape(plain.shape[0], -1)
    key = table.shape[1], table.dtype
    if key not in _VECTORS:
        _VECTORS[key] = torch.rand(key[0], generator=torch.Generator().manual_seed(0), dtype=key[1]).add_(0.5)
    return table @ _VECTORS[key]
