"""Rounding and its gradients on a GPU, in one pass over the values each; the arithmetic of `lq.quantizer.gradients`.

Values lie as (outer, channels, inner) in memory, the values of a channel sharing a step; one channel where a tensor has
one step. Each program works on tiles of channels by positions. Gradients to step and bounds are sums: each program
writes its own, which are added up afterwards in a fixed order, so that a run repeats exactly.

Operations are rounded as those of torch are: no fused multiply-adds, division to nearest, and rounding to integers
(ties to even) by adding and subtracting ``1.5 * 2**23``, for bounds within ``2**22``. Triton is imported here and
nowhere else, and this module by `lq.quantizer.kernels` alone, where a GPU is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lq.quantizer.places import Places
from lq.quantizer.rounding import Bound

_TILE = 1024  # values that a program works on at a time
_PROGRAMS = 4096  # about as many for the sums: enough for any GPU
_ACROSS = 32  # channels beside each other in memory that are read together

NUMBER, ONE, EACH = 0, 1, 2  # what a bound is: a number, a tensor of one, a tensor of one per channel


def tiles(places: Places) -> tuple[int, int]:
    """Channels and positions of a tile, powers of two; neighbours in memory are read together."""
    positions, channels = triton.next_power_of_2(places.count), triton.next_power_of_2(places.channels)
    if places.inner == 1 and places.channels > 1:
        across = min(channels, _ACROSS)
        return across, min(positions, _TILE // across)
    along = min(positions, _TILE)
    return min(channels, _TILE // along), along


@triton.jit
def _of_channel(value, c, known, KIND: tl.constexpr):
    if KIND == 2:
        out = tl.load(value + c, mask=known, other=0.0)[:, None]
    elif KIND == 1:
        out = tl.load(value)
    else:
        out = value
    return out


@triton.jit
def _place(c, n, channels, inner, WHOLE: tl.constexpr):
    if WHOLE:  # a channel lies in one piece; said so that neighbours are read in one go
        at = c[:, None] * inner + n
    else:
        at = (n // inner) * channels * inner + c[:, None] * inner + n % inner
    return at


@triton.jit
def _rounded(v, low, high, offset):
    v = (v - offset + 12582912.0) - 12582912.0 + offset
    return tl.where(v < low, low, tl.where(v > high, high, v))  # NaN stays


@triton.jit
def round_kernel(
    x_ptr,
    y_ptr,
    kept_ptr,
    step_ptr,
    low,
    high,
    offset,
    channels,
    count,
    inner,
    splits,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    """Round the values of a tile."""
    c = tl.program_id(0) // splits * BC + tl.arange(0, BC)
    n = (tl.program_id(0) % splits * BN + tl.arange(0, BN))[None, :]
    known = c < channels
    mask = known[:, None] & (n < count)
    at = _place(c, n, channels, inner, WHOLE)
    step = tl.load(step_ptr + c, mask=known, other=1.0)[:, None]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    lowest = _of_channel(low, c, known, LOW)
    highest = _of_channel(high, c, known, HIGH)
    y = _rounded(x * tl.div_rn(1.0, step), lowest, highest, _of_channel(offset, c, known, OFFSET)) * step
    if KEPT:
        y = tl.where(tl.load(kept_ptr + at, mask=mask, other=0.0) > 0.5, x, y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradients_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    kept_ptr,
    sums_ptr,
    step_ptr,
    low,
    high,
    offset,
    weight,
    channels,
    count,
    inner,
    splits,
    blocks,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    SUMS: tl.constexpr,
    BOUNDS: tl.constexpr,
    SQUARES: tl.constexpr,
    WEIGHS: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    """The gradient to the values of some tiles beside each other, and their sums."""
    part = tl.program_id(0) % splits
    c = tl.program_id(0) // splits * BC + tl.arange(0, BC)
    known = c < channels
    step = tl.load(step_ptr + c, mask=known, other=1.0)[:, None]
    inverse = tl.div_rn(1.0, step)
    lowest = _of_channel(low, c, known, LOW)
    highest = _of_channel(high, c, known, HIGH)
    shift = _of_channel(offset, c, known, OFFSET)
    product = tl.zeros((BC, BN), dtype=tl.float32)
    total = tl.zeros((BC, BN), dtype=tl.float32)
    outside = tl.zeros((BC, BN), dtype=tl.float32)
    square = tl.zeros((BC, BN), dtype=tl.float32)
    for block in range(blocks):
        n = ((part * blocks + block) * BN + tl.arange(0, BN))[None, :]
        mask = known[:, None] & (n < count)
        at = _place(c, n, channels, inner, WHOLE)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * inverse
        rounded = _rounded(v, lowest, highest, shift)
        passed = tl.where((v <= lowest) | (v >= highest), 0.0, grad)
        if KEPT:
            stays = tl.load(kept_ptr + at, mask=mask, other=0.0) > 0.5
            rounded = tl.where(stays, v, rounded)
            passed = tl.where(stays, grad, passed)
        if SUMS:
            product += rounded * grad - passed * v
            if BOUNDS:
                total += grad - passed
                outside += (grad - passed) * rounded
            if SQUARES:
                square += grad * grad
        if WEIGHS:
            passed += weight * tl.abs(passed) * (v - rounded)
        tl.store(out_ptr + at, passed.to(out_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        first = sums_ptr + c * splits + part
        row = channels * splits
        tl.store(first, tl.sum(product, axis=1), mask=known)
        if BOUNDS:
            tl.store(first + row, tl.sum(total, axis=1), mask=known)
            tl.store(first + 2 * row, tl.sum(outside, axis=1), mask=known)
        if SQUARES:
            tl.store(first + (3 if BOUNDS else 1) * row, tl.sum(square, axis=1), mask=known)


def kind(bound: Bound) -> int:
    """What a bound is, as the kernels are told."""
    if not isinstance(bound, Tensor):
        return NUMBER
    return ONE if bound.numel() == 1 else EACH


def round_values(
    x: Tensor, step: Tensor, low: Bound, high: Bound, offset: Bound, kept: Tensor | None, places: Places
) -> Tensor:
    """`x` rounded to its grid, in its dtype; tensors lie alike in memory, as `places` says."""
    y = torch.empty_like(x)
    across, along = tiles(places)
    splits = triton.cdiv(places.count, along)
    grid = (triton.cdiv(places.channels, across) * splits,)
    with torch.cuda.device_of(x):  # kernels run on the current device
        round_kernel[grid](
            x,
            y,
            x if kept is None else kept,
            step,
            _given(low),
            _given(high),
            _given(offset),
            places.channels,
            places.count,
            places.inner,
            splits,
            LOW=kind(low),
            HIGH=kind(high),
            OFFSET=kind(offset),
            KEPT=kept is not None,
            WHOLE=places.outer == 1,
            BC=across,
            BN=along,
            enable_fp_fusion=False,
        )
    return y


def gradients(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    bounds: tuple[Bound, Bound, Bound],
    kept: Tensor | None,
    places: Places,
    *,
    sums: bool,
    to_bounds: bool,
    squares: bool,
    weight: float | None,
) -> tuple[Tensor, Tensor]:
    """The gradient to `x`, in its dtype, and the sums that are asked for; shape (sums, channels).

    Args:
        grad: gradient to the rounded values; it lies in memory as `x` does.
        x: values.
        step: (channels,).
        bounds: lowest and highest level, and offset of the levels.
        kept: 1.0 where values stay as they are; None: nowhere.
        places: how they lie in memory.
        sums: whether the sum for the step is wanted.
        to_bounds: whether the two for the bounds are.
        squares: whether that of the squares of the gradients is.
        weight: strength of a gradient's part that grows with the rounding error; None: there is none.
    """
    out = torch.empty_like(x)
    across, along = tiles(places)
    needed, rows = triton.cdiv(places.count, along), triton.cdiv(places.channels, across)
    blocks = min(triton.cdiv(needed * rows, _PROGRAMS), needed) if sums else 1
    splits = triton.cdiv(needed, blocks)
    number = (1 + 2 * to_bounds + squares) if sums else 0
    found = torch.empty((number, places.channels, splits), dtype=torch.float32, device=x.device)
    low, high, offset = bounds
    with torch.cuda.device_of(x):  # kernels run on the current device
        gradients_kernel[(rows * splits,)](
            grad,
            x,
            out,
            x if kept is None else kept,
            found if sums else step,
            step,
            _given(low),
            _given(high),
            _given(offset),
            0.0 if weight is None else float(weight),
            places.channels,
            places.count,
            places.inner,
            splits,
            blocks,
            LOW=kind(low),
            HIGH=kind(high),
            OFFSET=kind(offset),
            KEPT=kept is not None,
            WHOLE=places.outer == 1,
            SUMS=sums,
            BOUNDS=to_bounds,
            SQUARES=squares,
            WEIGHS=weight is not None,
            BC=across,
            BN=along,
            enable_fp_fusion=False,
        )
    return out, found[..., 0] if splits == 1 else found.sum(-1)


def _given(bound: Bound) -> Any:
    """A bound as the kernels take it."""
    return bound if isinstance(bound, Tensor) else float(bound)
