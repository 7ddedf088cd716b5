"""Gradients of rounding to values, step and bounds, as sums over the elements that share a step.

The formulas are those of `lq.quantizer.functional`: ``s * dL/ds = sum(g * x^ - g_x * x)``, with ``g_x`` the gradient to
the values, and ``sum(g - g_x)``, ``sum((g - g_x) * x^)`` give what lies below and above the bounds. No tensor of
partial derivatives is made.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lq.quantizer.rounding import Bound, clamp_levels, mixed, round_levels

# Elements that the CPU works on at a time, of weights and of activations: they stay in its cache between operations.
_BLOCK, _LARGE_BLOCK = 1 << 18, 1 << 20


class Backward(Protocol):
    """What an estimator changes of the gradients."""

    @property
    def weighs(self) -> bool:
        """Whether `weigh` does anything."""
        ...

    @property
    def error_weight(self) -> float | None:
        """``w``, if `weigh` adds ``w * |grad| * error`` and nothing else, which fused kernels do themselves."""
        ...

    def weigh(self, grad: Tensor, error: Tensor) -> None:
        """Change the gradient to values in place, given ``v - round(v)`` where it is not zero; rows share a step."""
        ...

    def noise(self, size: Tensor) -> Tensor | None:
        """Random part of ``dL/ds``, given ``s * |g|`` over the values that share a step; None: there is none."""
        ...


class Sums:
    """Sums over the elements that share a step, from which the gradients to step and bounds follow."""

    def __init__(
        self, step: Tensor, low: Bound, high: Bound, to_bounds: bool, rule: Backward | None, wanted: bool = True
    ) -> None:
        self.step, self.low, self.high, self.to_bounds, self.rule = step, low, high, to_bounds, rule
        self.wanted = wanted  # False: the gradient to the values is all that is asked for
        self.product = self.outside = self.total = self.square = torch.zeros(())

    def take(self, found: Sequence[Tensor], shape: torch.Size, scale: float = 1.0) -> None:
        """Take sums in their order, those with levels in them times `scale`."""
        parts = [part.view(shape) for part in found]
        self.product = _scaled(parts.pop(0), scale)
        if self.to_bounds:
            self.total, self.outside = parts.pop(0), _scaled(parts.pop(0), scale)
        if self.rule is not None:
            self.square = parts.pop(0)

    def gradients(self, scale: Bound) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to log2 of the step, to the low and to the high bound."""
        factor = self.step * scale
        noise = self.rule.noise(self.square.sqrt_().mul_(self.step)) if self.rule is not None else None
        derivative = self.product if noise is None else self.product.add_(noise)
        to_step = derivative.mul_(math.log(2)).mul_(factor)
        if not self.to_bounds:
            return to_step, to_step, to_step
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            span: Bound = (self.high - self.low).clamp(min=1e-6)  # type: ignore[union-attr]
        else:
            span = max(self.high - self.low, 1e-6)
        above = self.outside.sub_(self.total * self.low).div_(span).mul_(factor)
        return to_step, self.total.mul_(factor).sub_(above), above


def _scaled(part: Tensor, scale: float) -> Tensor:
    return part if scale == 1.0 else part.mul_(scale)


def gradients(grad: Tensor, x: Tensor, offset: Bound, sums: Sums, kept: Tensor | None) -> Tensor:
    """The gradient to `x`, on any device and in any memory layout; fills `sums`."""
    shape = sums.step.shape
    levels = x * sums.step.reciprocal()
    grad_x = mixed(inside_of_bounds(grad, levels, sums.low, sums.high), grad, kept)
    rounded = mixed(clamp_levels(round_levels(levels.clone(), offset), sums.low, sums.high), levels, kept)
    sums.product = (rounded * grad).sum_to_size(shape).sub_((grad_x * levels).sum_to_size(shape))
    if sums.to_bounds:
        out = grad - grad_x
        sums.total, sums.outside = out.sum_to_size(shape), out.mul_(rounded).sum_to_size(shape)
    if sums.rule is None:
        return grad_x
    sums.square = grad.square().sum_to_size(shape)
    if not sums.rule.weighs:
        return grad_x
    order = sorted(range(x.ndim), key=lambda d: shape[d] == 1) if shape else list(range(x.ndim))
    back = [order.index(d) for d in range(x.ndim)]  # dimensions of the steps come first
    rows = [t.permute(order).reshape(max(sums.step.numel(), 1), -1) for t in (grad_x, levels.sub_(rounded))]
    weighed = rows[0].clone()
    sums.rule.weigh(weighed, rows[1])
    return weighed.view([x.shape[d] for d in order]).permute(back)


def tensor_gradients(grad: Tensor, x: Tensor, y: Tensor, sums: Sums, kept: Tensor | None) -> Tensor:
    """`gradients` for one step and contiguous CPU tensors, `y` being what became of `x`; in blocks of values."""
    size = float(sums.step)
    low, high = float(sums.low) * size, float(sums.high) * size
    grad_x = torch.empty_like(grad)
    found = []
    tensors = (grad, x, y, grad_x, grad if kept is None else kept)
    for g, v, q, out, stays in zip(*(t.view(-1).split(_LARGE_BLOCK) for t in tensors), strict=True):
        torch.ops.aten.hardtanh_backward.grad_input(g, v, low, high, grad_input=out)
        if kept is not None:
            mixed(out, g, stays)
        arrived = torch.dot(g, q)
        row = [arrived - torch.dot(out, v)]
        if sums.to_bounds:
            row += [g.sum() - out.sum(), arrived - torch.dot(out, q)]
        if sums.rule is not None:
            row.append(torch.dot(g, g))
            if sums.rule.weighs:
                sums.rule.weigh(out.view(1, -1), torch.sub(v, q).div_(size).view(1, -1))
        found.append(torch.stack(row))
    sums.take((torch.stack(found).sum(0) if len(found) > 1 else found[0]).unbind(), sums.step.shape, 1 / size)
    return grad_x


def channel_gradients(grad: Tensor, x: Tensor, offset: Bound, sums: Sums) -> Tensor:
    """`gradients` for steps along dimension 0 of contiguous CPU tensors; large ones in blocks of channels.

    Temporaries of many MB would cost more than the arithmetic: the system hands their memory out anew each time.
    """
    channels, shape = sums.step.numel(), sums.step.shape
    grad_x = torch.empty_like(grad)
    size = max(1, _BLOCK * channels // max(x.numel(), 1))
    tensors = [t.view(channels, -1).split(size) for t in (grad, x, grad_x, sums.step.reciprocal())]
    offset = 0.0 if isinstance(offset, Tensor) and not bool(offset.any()) else offset
    bounds = [_split(bound, size, len(tensors[0])) for bound in (sums.low, sums.high, offset)]
    found: list[list[Tensor]] = []
    for g, v, out, inverse, low, high, shift in zip(*tensors, *bounds, strict=True):
        levels = v * inverse
        _inside_of_rows(g, levels, low, high, out)
        product = torch.linalg.vecdot(out, levels)
        error = levels.clone() if sums.rule is not None and sums.rule.weighs else None
        rounded = clamp_levels(round_levels(levels, shift), low, high)
        arrived = torch.linalg.vecdot(g, rounded)
        row = [arrived - product]
        if sums.to_bounds:
            row += [g.sum(1).sub_(out.sum(1)), arrived.sub_(torch.linalg.vecdot(out, rounded))]
        if sums.rule is not None:
            row.append(torch.linalg.vecdot(g, g))
            if error is not None:
                sums.rule.weigh(out, error.sub_(rounded))
        found.append(row)
    sums.take([torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)], shape)
    return grad_x


def _inside_of_rows(grad: Tensor, levels: Tensor, low: Bound, high: Bound, out: Tensor) -> None:
    """Fill `out` with `grad` where ``low < levels < high``, else 0; each row may have bounds of its own."""
    if isinstance(low, Tensor):
        reach = torch.as_tensor(high - low).clamp(min=1e-6).reciprocal().mul_(2)
        levels = (levels * reach).sub_((low + high) * reach / 2)  # the bounds are -1 and 1
        low, high = -1.0, 1.0
    torch.ops.aten.hardtanh_backward.grad_input(grad, levels, low, high, grad_input=out)


def _split(bound: Bound, size: int, blocks: int) -> Any:
    """A bound for each block of channels."""
    if isinstance(bound, Tensor) and bound.numel() > 1:
        return bound.detach().reshape(-1, 1).split(size)
    return [bound.detach() if isinstance(bound, Tensor) else bound] * blocks


def inside_of_bounds(grad: Tensor, levels: Tensor, low: Bound, high: Bound) -> Tensor:
    """`grad` where ``low < levels < high``, else 0."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((levels > low) & (levels < high), grad, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, levels, low, high)  # type: ignore[no-any-return]
