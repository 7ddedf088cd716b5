r"""The arithmetic of quantization, as pure functions of tensors.

Forward: ``x^ = (clamp(round(x / s + z), 0, 2^b - 1) - z) * s``, computed in float32 as
``clamp(round(x / s), low, high) * s`` with the grid's bounds in steps, ``low = -z`` and ``high = 2^b - 1 - z``.

Backward (Esser et al., Learned Step Size Quantization, equations 3 to 5), ``v = x / s``:

- to the values, straight through inside the grid: ``dx^/dx = 1`` if ``low < v < high``, else 0;
- to the step: ``dx^/ds = round(v) - v`` inside, ``low`` below, ``high`` above, times a gradient scale ``1 / sqrt(N *
  Qp)``.

Both lines together are ``s * dL/ds = sum(g * x^ - g_x * x)``, with ``g_x`` the gradient to the values: two dot products
instead of a tensor of partial derivatives. Steps are given by their logarithm, so ``dL/d(log2 s) = ln 2 * s * dL/ds``.
Symmetric two-level grids lie at half steps: `offset` is 0.5 for them and 0 for the rest.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: A number for a whole tensor, or a tensor that broadcasts over its channels.
Bound = float | Tensor

#: |log2 of a step| is kept below this, so that steps and their reciprocals are float32 numbers.
STEP_LIMIT = 100.0

# Elements of a weight that the CPU works on at a time.
_BLOCK = 1 << 18


def step_size(log2_step: Tensor) -> Tensor:
    """The step, positive and finite, of its logarithm (which is NaN if no range is known yet)."""
    return torch.exp2(log2_step.clamp(-STEP_LIMIT, STEP_LIMIT))


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
    return _round(x * step.reciprocal(), offset).clamp_(low, high).mul_(step)  # type: ignore[arg-type]


def fake_quantize(
    x: Tensor, log2_step: Tensor, low: Bound, high: Bound, offset: Bound = 0.0, *, gradient_scale: Bound = 1.0
) -> Tensor:
    """Round `x` to a grid, with the straight-through gradient to `x` and LSQ's gradient to the step.

    Args:
        x: values, any shape and floating dtype; the arithmetic is float32, the result has the dtype of `x`.
        log2_step: logarithm of the step, float32; broadcasts to `x`: one element, or one per channel.
        low: lowest level, in steps.
        high: highest level, in steps.
        offset: 0 where levels are multiples of the step, 0.5 where they lie halfway between.
        gradient_scale: factor on the gradient to the step.

    >>> x = torch.tensor([0.3, 5.0], requires_grad=True)
    >>> log2_step = torch.tensor(-1.0, requires_grad=True)
    >>> fake_quantize(x, log2_step, -2, 1).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    >>> log2_step.grad / (0.5 * math.log(2))  # (round(0.6) - 0.6) + 1
    tensor(1.4000)
    """
    if torch.is_grad_enabled() and (x.requires_grad or log2_step.requires_grad):
        return _FakeQuantize.apply(x, log2_step, low, high, offset, gradient_scale)  # type: ignore[no-any-return]
    return round_to_grid(x.float(), step_size(log2_step), low, high, offset).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log2_step: Tensor, low: Bound, high: Bound, offset: Bound, gradient_scale: Bound
    ) -> Tensor:
        step = step_size(log2_step)
        y = round_to_grid(x.float(), step, low, high, offset)
        # The consumer keeps y for its own backward (in float32), so that keeping it here costs no memory.
        keep = ctx.needs_input_grad[1] and x.dtype == torch.float32 and x.device.type == "cpu"
        ctx.save_for_backward(x, step, y if keep and step.numel() == 1 else None)
        ctx.grid = (low, high, offset)
        ctx.gradient_scale = gradient_scale
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, y = ctx.saved_tensors
        low, high, offset = ctx.grid
        grad32, x32 = grad.float(), x.float()
        grad_step = None
        if not ctx.needs_input_grad[1]:
            grad_x = _inside(grad32, x32 * step.reciprocal(), low, high)
        else:
            plain = x32.is_contiguous() and grad32.is_contiguous() and not isinstance(low, Tensor)
            if plain and y is not None:
                grad_x, inner = _tensor_gradients(grad32, x32, y, step, low, high)
            elif plain and x.device.type == "cpu" and step.ndim and step.numel() == step.shape[0]:
                grad_x, inner = _channel_gradients(grad32, x32, step, low, high, offset)
            else:
                grad_x, inner = _gradients(grad32, x32, step, low, high, offset)
            grad_step = inner.mul_(ctx.gradient_scale * math.log(2))
        return grad_x.to(x.dtype), grad_step, None, None, None, None


def _gradients(grad: Tensor, x: Tensor, step: Tensor, low: Bound, high: Bound, offset: Bound) -> tuple[Tensor, Tensor]:
    """The gradient to `x`; and ``sum(grad * x^ - grad_x * x)`` over elements that share a step, shaped like `step`."""
    levels = x * step.reciprocal()
    grad_x = _inside(grad, levels, low, high)
    passed = (grad_x * levels).sum_to_size(step.shape)
    rounded = _round(levels, offset).clamp_(low, high)  # type: ignore[arg-type]
    return grad_x, rounded.mul_(grad).sum_to_size(step.shape).sub_(passed).mul_(step)


def _tensor_gradients(
    grad: Tensor, x: Tensor, y: Tensor, step: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """`_gradients` for one step and contiguous CPU tensors: three passes over memory, no temporaries."""
    size = float(step)
    grad_x = torch.ops.aten.hardtanh_backward(grad, x, low * size, high * size)
    inner = torch.dot(grad.view(-1), y.view(-1)).sub_(torch.dot(grad_x.view(-1), x.view(-1)))
    return grad_x, inner.view(step.shape)


def _channel_gradients(
    grad: Tensor, x: Tensor, step: Tensor, low: float, high: float, offset: float
) -> tuple[Tensor, Tensor]:
    """`_gradients` for steps along dimension 0 of contiguous CPU tensors; large ones in blocks of channels.

    Temporaries of many MB would cost more than the arithmetic: the system hands their memory out anew each time.
    """
    grad_x = torch.empty_like(grad)
    channels = step.numel()
    size = max(1, _BLOCK * channels // max(x.numel(), 1))
    rows = (t.view(channels, -1).split(size) for t in (grad, x, grad_x, step.reciprocal()))
    inner = []
    for g, v, out, inverse in zip(*rows, strict=True):
        levels = v * inverse
        torch.ops.aten.hardtanh_backward.grad_input(g, levels, low, high, grad_input=out)
        passed = torch.linalg.vecdot(out, levels)
        inner.append(torch.linalg.vecdot(g, _round(levels, offset).clamp_(low, high)).sub_(passed))
    total = inner[0] if len(inner) == 1 else torch.cat(inner)
    return grad_x, total.view(step.shape).mul_(step)


def _round(levels: Tensor, offset: Bound) -> Tensor:
    """Round in place to integers plus `offset`."""
    if isinstance(offset, Tensor) or offset:
        return levels.sub_(offset).round_().add_(offset)
    return levels.round_()


def _inside(grad: Tensor, levels: Tensor, low: Bound, high: Bound) -> Tensor:
    """`grad` where ``low < levels < high``, else 0."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((levels > low) & (levels < high), grad, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, levels, low, high)  # type: ignore[no-any-return]
