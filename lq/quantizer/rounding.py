"""Rounding to the levels of a grid, in place and without gradients; what `lq.quantizer.functional` is made of."""

import torch
from torch import Tensor

#: A number for a whole tensor, or a tensor that broadcasts over its channels.
Bound = float | Tensor

#: |log2 of a step| is kept below this, so that steps and their reciprocals are float32 numbers.
STEP_LIMIT = 100.0


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
    low, high = alike(low, high)
    return clamp_levels(round_levels(x * step.reciprocal(), offset), low, high).mul_(step)


def on_host(tensor: Tensor) -> bool:
    """Whether a number can be read without waiting, and without a break in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def alike(low: Bound, high: Bound) -> tuple[Bound, Bound]:
    """Both bounds as numbers or both as tensors; single ones on the CPU, which waits for nobody, as numbers."""
    low, high = (float(b) if isinstance(b, Tensor) and b.numel() == 1 and on_host(b) else b for b in (low, high))
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        like = low if isinstance(low, Tensor) else high
        low, high = (b if isinstance(b, Tensor) else torch.as_tensor(like).new_full((), b) for b in (low, high))
    return low, high


def round_levels(levels: Tensor, offset: Bound) -> Tensor:
    """Round in place to integers plus `offset`."""
    if isinstance(offset, Tensor) or offset:
        return levels.sub_(offset).round_().add_(offset)
    return levels.round_()


def clamp_levels(levels: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp in place (`clamp_` itself takes seven times as long with tensors as bounds)."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.minimum(torch.maximum(levels, low, out=levels), high, out=levels)
    return levels.clamp_(low, high)  # type: ignore[arg-type]


def mixed(rounded: Tensor, whole: Tensor, kept: Tensor | None) -> Tensor:
    """`rounded`, in place, with `whole` where `kept` is 1 (`torch.where` takes twenty times as long on a CPU)."""
    return rounded if kept is None else torch.lerp(rounded, whole, kept, out=rounded)
