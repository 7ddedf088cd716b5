r"""What a change of a layer's weight does to a scalar of the output, to first order, per sample and output channel.

For a layer with input ``a`` and gradient ``δ`` at its output, ``g_n · ΔW = <δ_n, layer(a_n; ΔW)>``. Keeping the output
channels apart gives every channel's term for W changes at once, ``t[n, c, w] = <δ[n, c], layer(a_n; ΔW_w)[c]>``.

Two orders of summation lead there. Forming the gradient of each sample's weight first and multiplying all changes by it
costs ``C K (P + W)`` multiplications for ``C`` channels with ``K`` weights and ``P`` positions; sending the input
through all changes costs ``C P W (K + 1)``. The cheaper one is taken ("ghost clipping" makes the same choice, Bu et al.
2022).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lq.structure.calls import Call

# Elements of the intermediates that are worked on at a time: they should stay in a cache.
_BLOCK = 1 << 21

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def operands_of(call: Call) -> tuple[Tensor, Any, str] | None:
    """Input and weight of a call that `terms` can take, and the weight's name; None: it cannot take the call."""
    if call.kind == "matmul":
        return call.operand("left"), call.operand("right"), "right"
    if call.kind == "linear" or call.kind.startswith("conv"):
        return call.operand("input"), call.operand("weight"), "weight"
    if call.kind == "embedding":
        return call.args[0] if call.args else call.kwargs["input"], call.operand("weight"), "weight"
    return None


def terms(
    call: Call, weight: Tensor, delta: Tensor, changes: Tensor, samples: int, samples_last: bool = False
) -> Tensor:
    """Terms of a call of a layer, by sample, output channel and change.

    Args:
        call: the call, of a kind that `operands_of` knows.
        weight: the weight it was called with.
        delta: gradient at its result.
        changes: of the weight, (W, *weight.shape), float32 or float64; the arithmetic is in that dtype.
        samples: number of samples in the batch; dimension 0 of the input holds one or more rows for each.
        samples_last: rows of features hold the samples in turn, not one after the other (time-major sequences).

    Returns:
        Shape (samples, C, W).
    """
    delta = delta.to(changes.dtype)
    if call.kind == "embedding":
        return _embedding(call, delta, changes, samples)
    given = call.operand("left" if call.kind == "matmul" else "input").detach().to(changes.dtype)
    if call.kind in ("linear", "matmul"):
        changes = changes.transpose(1, 2) if call.kind == "matmul" else changes
        return contract(by_sample(given, samples, samples_last), by_sample(delta, samples, samples_last), changes)
    found = _convolution(call, weight, given, delta, changes)
    return found.view(samples, -1, *found.shape[1:]).sum(1)


def by_sample(x: Tensor, samples: int, samples_last: bool) -> Tensor:
    """Rows of features (..., K) by sample, (samples, rows, K)."""
    features = x.shape[-1] if x.ndim else 1
    return x.reshape(-1, samples, features).transpose(0, 1) if samples_last else x.reshape(samples, -1, features)


def contract(rows: Tensor, delta: Tensor, changes: Tensor) -> Tensor:
    """Terms of a matrix product.

    Args:
        rows: inputs, (B, P, K).
        delta: gradients at the outputs, (B, P, C).
        changes: (W, C, K).

    Returns:
        Shape (B, C, W).

    >>> contract(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(5, 4, 3)).unique()
    tensor([6.])
    """
    batch, positions, inner = rows.shape
    width, channels, _ = changes.shape
    if positions * width * (inner + 1) <= inner * (positions + width):
        moved = rows.reshape(-1, inner) @ changes.reshape(-1, inner).T
        moved = moved.view(batch, positions, width, channels).mul_(delta.unsqueeze(2))
        return moved.sum(1).transpose(1, 2)
    found = rows.new_empty(channels, batch, width)
    size = max(1, _BLOCK // ((batch + width) * inner))
    for start in range(0, channels, size):
        block = slice(start, start + size)
        gradients = torch.bmm(delta[:, :, block].transpose(1, 2), rows)  # of each sample's weight
        torch.bmm(gradients.transpose(0, 1), changes[:, block].permute(1, 2, 0), out=found[block])
    return found.transpose(0, 1)


def _convolution(call: Call, weight: Tensor, given: Tensor, delta: Tensor, changes: Tensor) -> Tensor:
    """Terms by row of dimension 0, (rows, C, W)."""
    transposed = call.kind.startswith("conv_transpose")
    names = _TRANSPOSED if transposed else _CONV
    options = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    dims = weight.ndim - 2
    stride, dilation, extra = (
        _each(options.get(name, default), dims)
        for name, default in (("stride", 1), ("dilation", 1), ("output_padding", 0))
    )
    groups = int(options.get("groups", 1))
    padding = options.get("padding", 0)
    if given.ndim == dims + 1:
        given, delta = given.unsqueeze(0), delta.unsqueeze(0)
    if isinstance(padding, str):
        given, padding = _pad(given, padding, weight.shape[2:], dilation), 0
    padding = _each(padding, dims)
    batch, channels = delta.shape[:2]
    positions = delta[0, 0].numel()
    if groups == 1 and not transposed and (positions <= channels or max(weight.shape[2:]) == 1):
        rows = _windows(given, weight.shape[2:], stride, padding, dilation)
        return contract(rows, delta.flatten(2).transpose(1, 2), changes.flatten(2))
    # The samples become groups of one convolution, whose weight gradient is that of each sample.
    gradients = torch.ops.aten.convolution_backward(
        delta.reshape(1, batch * channels, *delta.shape[2:]),
        given.reshape(1, -1, *given.shape[2:]),
        given.new_empty(1).expand(batch * weight.shape[0], *weight.shape[1:]),
        None,
        stride,
        padding,
        dilation,
        transposed,
        extra,
        groups * batch,
        [False, True, False],
    )[1]
    mine, theirs = gradients.view(batch, *weight.shape), changes
    if transposed:
        mine, theirs = (t.unflatten(1, (groups, -1)).transpose(2, 3).flatten(1, 2) for t in (mine, theirs))
    mine, theirs = mine.flatten(2).transpose(0, 1), theirs.flatten(2).permute(1, 2, 0)
    return torch.bmm(mine, theirs).transpose(0, 1)


def _windows(given: Tensor, kernel: torch.Size, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """The inputs of each output position as rows: (B, P, C_in * kernel)."""
    if max(padding):
        given = F.pad(given, [p for size in reversed(padding) for p in (size, size)])
    given = given.contiguous()
    sizes = [
        (length - step * (size - 1) - 1) // jump + 1
        for length, size, jump, step in zip(given.shape[2:], kernel, stride, dilation, strict=True)
    ]
    outer, inner = given.stride()[:2], given.stride()[2:]
    taps = [step * s for step, s in zip(dilation, inner, strict=True)]
    jumps = [jump * s for jump, s in zip(stride, inner, strict=True)]
    windows = given.as_strided((*given.shape[:2], *kernel, *sizes), (*outer, *taps, *jumps))
    return windows.reshape(given.shape[0], given.shape[1] * kernel.numel(), -1).transpose(1, 2)


def _embedding(call: Call, delta: Tensor, changes: Tensor, samples: int) -> Tensor:
    options = dict(zip(("input", "weight", "padding_idx"), call.args, strict=False)) | call.kwargs
    ids = options["input"].reshape(samples, -1)
    delta = delta.reshape(samples, ids.shape[1], -1)
    if options.get("padding_idx") is not None:
        delta = delta * (ids != options["padding_idx"] % changes.shape[1]).unsqueeze(-1)
    moved = torch.einsum("btd,wbtd->btw", delta, changes[:, ids])
    found = moved.new_zeros(samples, changes.shape[1], changes.shape[0])
    return found.scatter_add_(1, ids.unsqueeze(-1).expand_as(moved), moved)


def _each(value: int | tuple[int, ...] | list[int], dims: int) -> list[int]:
    """One number per dimension."""
    if isinstance(value, int):
        return [value] * dims
    return [int(v) for v in value] * (dims if len(value) == 1 else 1)


def _pad(given: Tensor, padding: str, kernel: torch.Size, dilation: list[int]) -> Tensor:
    """Padding that was given as "same" or "valid"."""
    if padding == "valid":
        return given
    totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    return F.pad(given, [p for total in reversed(totals) for p in (total // 2, total - total // 2)])
