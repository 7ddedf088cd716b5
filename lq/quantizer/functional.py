r"""The arithmetic of quantization, as pure functions of tensors.

Forward: ``x^ = (clamp(round(x / s + z), 0, 2^b - 1) - z) * s``, computed in float32 as
``clamp(round(x / s), low, high) * s`` with the grid's bounds in steps, ``low = -z`` and ``high = 2^b - 1 - z``.

Backward (Esser et al., Learned Step Size Quantization, equations 3 to 5), ``v = x / s``:

- to the values, straight through inside the grid: ``dx^/dx = 1`` if ``low < v < high``, else 0;
- to the step: ``dx^/ds = round(v) - v`` inside, ``low`` below, ``high`` above, times a gradient scale ``1 / sqrt(N *
  Qp)``;
- to the bounds, where they are learned: ``dx^/dlow = s`` below, ``dx^/dhigh = s`` above, else 0.

All are sums of products that share their factors: ``s * dL/ds = sum(g * x^ - g_x * x)``, with ``g_x`` the gradient to
the values, and ``sum(g - g_x)``, ``sum((g - g_x) * x^)`` give what lies below and above (between integer widths a value
beyond a bound may round to the level before it; it counts for both bounds, by where that level lies). No tensor of
partial derivatives is made. Steps are given by their logarithm, so ``dL/d(log2 s) = ln 2 * s * dL/ds``. Symmetric
two-level grids lie at half steps: `offset` is 0.5 for them and 0 for the rest. What `lq.quantizer.estimators` do
otherwise enters as a `Backward`.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lq.errors import StateError

#: A number for a whole tensor, or a tensor that broadcasts over its channels.
Bound = float | Tensor

#: |log2 of a step| is kept below this, so that steps and their reciprocals are float32 numbers.
STEP_LIMIT = 100.0

# Elements that the CPU works on at a time, of weights and of activations: they stay in its cache between operations.
_BLOCK, _LARGE_BLOCK = 1 << 18, 1 << 20


class Backward(Protocol):
    """What an estimator changes of the gradients above."""

    @property
    def weighs(self) -> bool:
        """Whether `weigh` does anything."""
        ...

    def weigh(self, grad: Tensor, error: Tensor) -> None:
        """Change the gradient to values in place, given ``v - round(v)`` where it is not zero; rows share a step."""
        ...

    def noise(self, size: Tensor) -> Tensor | None:
        """Random part of ``dL/ds``, given ``s * |g|`` over the values that share a step; None: there is none."""
        ...


def step_size(log2_step: Tensor) -> Tensor:
    """The step, positive and finite, of its logarithm (which is NaN if no range is known yet)."""
    return torch.exp2(log2_step.clamp(-STEP_LIMIT, STEP_LIMIT))


def transforms_active() -> bool:
    """Whether code runs inside a transform of ``torch.func``, whose tensors have no values to look at."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and not torch.compiler.is_compiling() and bool(active())


def round_to_grid(x: Tensor, step: Tensor, low: Bound, high: Bound, offset: Bound = 0.0) -> Tensor:
    """`x` rounded to the nearest level of a grid, without a gradient of its own.

    Args:
        x: values, any shape, float32.
        step: distance of two levels, positive; broadcasts to `x`.
        low: lowest level, in steps; a number, or a tensor that broadcasts to `x`.
        high: highest level, in steps.
        offset: 0 where levels are multiples of the step, 0.5 where they lie halfway between.

    >>> round_to_grid(torch.tensor([-9.0, 0.4, 0.6, 9.0]), torch.tensor(0.5), -2, 1)
    tensor([-1.0000,  0.5000,  0.5000,  0.5000])
    """
    low, high = _alike(low, high)
    return _clamp(_round(x * step.reciprocal(), offset), low, high).mul_(step)


def fake_quantize(
    x: Tensor,
    log2_step: Tensor,
    low: Bound,
    high: Bound,
    offset: Bound = 0.0,
    *,
    gradient_scale: Bound = 1.0,
    backward: Backward | None = None,
    kept: Tensor | None = None,
    changed: bool = False,
) -> Tensor:
    """Round `x` to a grid, with the straight-through gradient to `x` and LSQ's gradient to the step.

    Args:
        x: values, any shape and floating dtype; the arithmetic is float32, the result has the dtype of `x`.
        log2_step: logarithm of the step, float32; broadcasts to `x`: one element, or one per channel.
        low: lowest level, in steps; a tensor that requires a gradient gets one.
        high: highest level, in steps; likewise.
        offset: 0 where levels are multiples of the step, 0.5 where they lie halfway between.
        gradient_scale: factor on the gradients to step and bounds.
        backward: what an estimator changes of the gradients; None: nothing.
        kept: 1.0 where a value stays as it is, 0.0 where it is rounded, shaped like `x`, float32; None: all are
            rounded.
        changed: whether code behind it may change the result in place; then it is not used in backward.

    >>> x = torch.tensor([0.3, 5.0], requires_grad=True)
    >>> log2_step = torch.tensor(-1.0, requires_grad=True)
    >>> fake_quantize(x, log2_step, -2, 1).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    >>> log2_step.grad / (0.5 * math.log(2))  # (round(0.6) - 0.6) + 1
    tensor(1.4000)
    """
    if transforms_active():
        return _differentiable(x, log2_step, low, high, offset, gradient_scale, backward, kept)
    learned = (t for t in (x, log2_step, low, high) if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        rounded: Tensor = _FakeQuantize.apply(x, log2_step, low, high, offset, gradient_scale, backward, kept, changed)
        return rounded
    return _mixed(round_to_grid(x.float(), step_size(log2_step), low, high, offset), x.float(), kept).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log2_step: Tensor,
        low: Bound,
        high: Bound,
        offset: Bound,
        gradient_scale: Bound,
        backward: Backward | None,
        kept: Tensor | None,
        changed: bool,
    ) -> Tensor:
        step = step_size(log2_step)
        y = _mixed(round_to_grid(x.float(), step, low, high, offset), x.float(), kept)
        # The consumer keeps y for its own backward (in float32), so that keeping it here costs no memory.
        keep = any(ctx.needs_input_grad[1:4]) and x.dtype == torch.float32 and _on_host(x) and not changed
        ctx.bounds = [None if isinstance(bound, Tensor) else bound for bound in (low, high, offset)]
        tensors = (bound if isinstance(bound, Tensor) else None for bound in (low, high, offset))
        ctx.save_for_backward(x, log2_step, step, y if keep and step.numel() == 1 else None, kept, *tensors)
        ctx.gradient_scale = gradient_scale
        ctx.backward_rule = backward
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, log2_step, step, y, kept, *tensors = ctx.saved_tensors
        low, high, offset = (b if t is None else t for b, t in zip(ctx.bounds, tensors, strict=True))
        if torch.is_grad_enabled():  # the gradient will be differentiated, as gradient penalties are
            inputs = x, log2_step, low, high
            rest = offset, ctx.gradient_scale, ctx.backward_rule, kept
            return *_differentiable_gradients(grad, inputs, ctx.needs_input_grad, rest), *(None,) * 5
        shapes = [bound.shape if isinstance(bound, Tensor) else () for bound in (low, high)]
        low, high = _alike(low, high)
        if grad.is_sparse:  # of an embedding's weight: the optimizer expects rows
            found = _FakeQuantize.backward(ctx, grad.to_dense())
            return None if found[0] is None else found[0].sparse_mask(grad.coalesce()), *found[1:]
        grad32, x32, rule = grad.float(), x.float(), ctx.backward_rule
        to_step, to_bounds = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:4])
        if not to_step and not to_bounds and rule is None:
            inside = _inside(grad32, x32 * step.reciprocal(), low, high)
            return _mixed(inside, grad32, kept).to(x.dtype), *(None,) * 8
        sums = _Sums(step, low, high, to_bounds, rule)
        plain = x32.is_contiguous() and grad32.is_contiguous() and _on_host(x)
        plain = plain and (kept is None or kept.is_contiguous())
        if plain and y is not None and not isinstance(low, Tensor):
            grad_x = _tensor_gradients(grad32, x32, y, sums, kept)
        elif plain and step.ndim and step.numel() == step.shape[0] and kept is None:
            grad_x = _channel_gradients(grad32, x32, offset, sums)
        else:
            grad_x = _gradients(grad32, x32, offset, sums, kept)
        grad_step, grad_low, grad_high = sums.gradients(ctx.gradient_scale)
        bounds = (
            found.sum_to_size(shape) if needed else None
            for found, shape, needed in zip((grad_low, grad_high), shapes, ctx.needs_input_grad[2:4], strict=True)
        )
        return grad_x.to(x.dtype), grad_step if to_step else None, *bounds, *(None,) * 5


def _differentiable(
    x: Tensor,
    log2_step: Tensor,
    low: Bound,
    high: Bound,
    offset: Bound,
    gradient_scale: Bound,
    rule: Backward | None,
    kept: Tensor | None,
) -> Tensor:
    """`fake_quantize` of operations that have all derivatives, for transforms of ``torch.func`` and gradient penalties.

    The derivatives of straight-through gradients are those of the values that they are multiplied by.

    Raises:
        StateError: if a gradient is wanted that `rule` would change.
    """
    learned = [t for t in (x, log2_step, low, high) if isinstance(t, Tensor)]
    if rule is not None and torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        raise StateError(
            f"the gradients of {type(rule).__name__} have no derivatives, as gradient penalties and torch.func want; "
            "use the estimator 'ste', 'lsq' or 'lsq_plus'"
        )
    values, step = x.float(), step_size(log2_step)
    levels = (values * step.reciprocal()).detach()
    rounded = torch.clamp(torch.round(levels - offset) + offset, *_tensors(low, high, levels))
    step, low, high = (_scaled(part, gradient_scale) for part in (step, low, high))
    # What has the gradients: the rounded value is what it is, whatever they say.
    inside = values + step * (rounded - levels)
    passed = torch.where(levels <= low, low * step, torch.where(levels >= high, high * step, inside))
    result = (rounded * step).detach() + (passed - passed.detach())
    return (result if kept is None else torch.lerp(result, values, kept)).to(x.dtype)


def _scaled(part: Any, scale: Bound) -> Any:
    """`part`, whose gradient is multiplied by `scale`."""
    return part.detach() + (part - part.detach()) * scale if isinstance(part, Tensor) else part


def _tensors(low: Bound, high: Bound, like: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (torch.as_tensor(bound, dtype=like.dtype, device=like.device).detach() for bound in (low, high))
    return low, high


def _differentiable_gradients(
    grad: Tensor, inputs: tuple[Any, ...], needed: Sequence[bool], rest: tuple[Any, ...]
) -> list[Tensor | None]:
    """The gradients to values, step and bounds, as functions of them and of `grad`."""
    wanted = [value for value, needs in zip(inputs, needed, strict=False) if needs]
    found = iter(torch.autograd.grad(_differentiable(*inputs, *rest), wanted, grad, create_graph=True))
    return [next(found) if needs else None for _, needs in zip(inputs, needed, strict=False)]


class _Sums:
    """Sums over the elements that share a step, from which the gradients to step and bounds follow."""

    def __init__(self, step: Tensor, low: Bound, high: Bound, to_bounds: bool, rule: Backward | None) -> None:
        self.step, self.low, self.high, self.to_bounds, self.rule = step, low, high, to_bounds, rule
        self.product = self.outside = self.total = self.square = torch.zeros(())

    def take(self, found: Sequence[Tensor], shape: torch.Size, scale: float = 1.0) -> None:
        """Take sums in their order, those with levels in them times `scale`."""
        parts = [part.view(shape) for part in found]
        self.product = parts.pop(0).mul_(scale)
        if self.to_bounds:
            self.total, self.outside = parts.pop(0), parts.pop(0).mul_(scale)
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


def _gradients(grad: Tensor, x: Tensor, offset: Bound, sums: _Sums, kept: Tensor | None) -> Tensor:
    """The gradient to `x`, on any device and in any memory layout; fills `sums`."""
    shape = sums.step.shape
    levels = x * sums.step.reciprocal()
    grad_x = _mixed(_inside(grad, levels, sums.low, sums.high), grad, kept)
    rounded = _mixed(_clamp(_round(levels.clone(), offset), sums.low, sums.high), levels, kept)
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


def _tensor_gradients(grad: Tensor, x: Tensor, y: Tensor, sums: _Sums, kept: Tensor | None) -> Tensor:
    """`_gradients` for one step and contiguous CPU tensors, `y` being what became of `x`; in blocks of values."""
    size = float(sums.step)
    low, high = float(sums.low) * size, float(sums.high) * size
    grad_x = torch.empty_like(grad)
    found = []
    tensors = (grad, x, y, grad_x, grad if kept is None else kept)
    for g, v, q, out, stays in zip(*(t.view(-1).split(_LARGE_BLOCK) for t in tensors), strict=True):
        torch.ops.aten.hardtanh_backward.grad_input(g, v, low, high, grad_input=out)
        if kept is not None:
            _mixed(out, g, stays)
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


def _channel_gradients(grad: Tensor, x: Tensor, offset: Bound, sums: _Sums) -> Tensor:
    """`_gradients` for steps along dimension 0 of contiguous CPU tensors; large ones in blocks of channels.

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
        rounded = _clamp(_round(levels, shift), low, high)
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


def _on_host(tensor: Tensor) -> bool:
    """Whether a number can be read without waiting, and without a break in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _alike(low: Bound, high: Bound) -> tuple[Bound, Bound]:
    """Both bounds as numbers or both as tensors; single ones on the CPU, which waits for nobody, as numbers."""
    low, high = (float(b) if isinstance(b, Tensor) and b.numel() == 1 and _on_host(b) else b for b in (low, high))
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        like = low if isinstance(low, Tensor) else high
        low, high = (b if isinstance(b, Tensor) else torch.as_tensor(like).new_tensor(b) for b in (low, high))
    return low, high


def _round(levels: Tensor, offset: Bound) -> Tensor:
    """Round in place to integers plus `offset`."""
    if isinstance(offset, Tensor) or offset:
        return levels.sub_(offset).round_().add_(offset)
    return levels.round_()


def _clamp(levels: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp in place (`clamp_` itself takes seven times as long with tensors as bounds)."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.minimum(torch.maximum(levels, low, out=levels), high, out=levels)
    return levels.clamp_(low, high)  # type: ignore[arg-type]


def _mixed(rounded: Tensor, whole: Tensor, kept: Tensor | None) -> Tensor:
    """`rounded`, in place, with `whole` where `kept` is 1 (`torch.where` takes twenty times as long on a CPU)."""
    return rounded if kept is None else torch.lerp(rounded, whole, kept, out=rounded)


def _inside(grad: Tensor, levels: Tensor, low: Bound, high: Bound) -> Tensor:
    """`grad` where ``low < levels < high``, else 0."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((levels > low) & (levels < high), grad, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, levels, low, high)  # type: ignore[no-any-return]
