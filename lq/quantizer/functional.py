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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lq.errors import StateError
from lq.quantizer.gradients import Backward, Sums, channel_gradients, gradients, inside_of_bounds, tensor_gradients
from lq.quantizer.kernels import fused_gradients, rounded
from lq.quantizer.rounding import Bound, alike, mixed, on_host, step_size


def transforms_active() -> bool:
    """Whether code runs inside a transform of ``torch.func``, whose tensors have no values to look at."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and not torch.compiler.is_compiling() and bool(active())


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

    >>> import math
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
        result: Tensor = _FakeQuantize.apply(x, log2_step, low, high, offset, gradient_scale, backward, kept, changed)
        return result
    return rounded(x, step_size(log2_step), low, high, offset, kept)


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
        y = rounded(x, step, low, high, offset, kept)
        # The consumer keeps y for its own backward (in float32), so that keeping it here costs no memory.
        keep = any(ctx.needs_input_grad[1:4]) and x.dtype == torch.float32 and on_host(x) and not changed
        ctx.bounds = [None if isinstance(bound, Tensor) else bound for bound in (low, high, offset)]
        tensors = (bound if isinstance(bound, Tensor) else None for bound in (low, high, offset))
        ctx.save_for_backward(x, log2_step, step, y if keep and step.numel() == 1 else None, kept, *tensors)
        ctx.gradient_scale = gradient_scale
        ctx.backward_rule = backward
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, log2_step, step, y, kept, *tensors = ctx.saved_tensors
        low, high, offset = (b if t is None else t for b, t in zip(ctx.bounds, tensors, strict=True))
        if torch.is_grad_enabled():  # the gradient will be differentiated, as gradient penalties are
            inputs = x, log2_step, low, high
            rest = offset, ctx.gradient_scale, ctx.backward_rule, kept
            return *_differentiable_gradients(grad, inputs, ctx.needs_input_grad, rest), *(None,) * 5
        shapes = [bound.shape if isinstance(bound, Tensor) else () for bound in (low, high)]
        low, high = alike(low, high)
        if grad.is_sparse:  # of an embedding's weight: the optimizer expects rows
            found = _FakeQuantize.backward(ctx, grad.to_dense())
            return None if found[0] is None else found[0].sparse_mask(grad.coalesce()), *found[1:]
        rule = ctx.backward_rule
        to_step, to_bounds = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:4])
        sums = Sums(step, low, high, to_bounds, rule, wanted=to_step or to_bounds or rule is not None)
        grad_x = fused_gradients(grad, x, offset, sums, kept)
        if grad_x is None:
            grad_x = _gradients(grad, x, y, offset, sums, kept)
        if not sums.wanted:
            return grad_x, *(None,) * 8
        grad_step, grad_low, grad_high = sums.gradients(ctx.gradient_scale)
        bounds = (
            found.sum_to_size(shape) if needed else None
            for found, shape, needed in zip((grad_low, grad_high), shapes, ctx.needs_input_grad[2:4], strict=True)
        )
        return grad_x, grad_step if to_step else None, *bounds, *(None,) * 5


def _gradients(grad: Tensor, x: Tensor, y: Tensor | None, offset: Bound, sums: Sums, kept: Tensor | None) -> Tensor:
    """The gradient to `x` of operations of torch, by the way that suits device and layout; fills `sums`."""
    grad32, x32, step = grad.float(), x.float(), sums.step
    if not sums.wanted:
        inside = inside_of_bounds(grad32, x32 * step.reciprocal(), sums.low, sums.high)
        return mixed(inside, grad32, kept).to(x.dtype)
    plain = x32.is_contiguous() and grad32.is_contiguous() and on_host(x)
    plain = plain and (kept is None or kept.is_contiguous())
    if plain and y is not None and not isinstance(sums.low, Tensor):
        grad_x = tensor_gradients(grad32, x32, y, sums, kept)
    elif plain and step.ndim and step.numel() == step.shape[0] and kept is None:
        grad_x = channel_gradients(grad32, x32, offset, sums)
    else:
        grad_x = gradients(grad32, x32, offset, sums, kept)
    return grad_x.to(x.dtype)


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
