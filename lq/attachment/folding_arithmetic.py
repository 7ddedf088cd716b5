r"""The numbers of a convolution with its BatchNorm, computed in float64.

With ``g = gamma / sqrt(var + eps)`` and ``t = beta - mean * g``: a convolution before the norm becomes ``w' = w * g``,
``b' = b * g + t``; one after it ``w' = w * g`` along its input channels and ``b' = b + sum(w * t)``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lq.structure.channels import ChannelLayout


def folded_parameters(
    weight: Tensor, bias: Tensor | None, norm: Any, conv: Any, norm_first: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its norm; computed in float64."""
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    wide = weight.double()
    if norm_first:
        per_group = (conv.groups, 1, -1, *[1] * (weight.ndim - 2))
        grouped = wide.unflatten(0, (conv.groups, -1))
        scaled = (grouped * gain.view(per_group)).flatten(0, 1)
        added = (grouped * shift.view(per_group)).flatten(0, 1).flatten(1).sum(1)
        total = added if bias is None else added + bias.double()
    else:
        layout = ChannelLayout.of(conv, weight)
        scaled = layout.join(layout.split(wide) * layout.spread(gain, weight))
        total = shift if bias is None else bias.double() * gain + shift
    return scaled.to(weight.dtype), total.to(weight.dtype)


def computes_the_same(conv: Any, norm: Any, weight: Tensor, bias: Tensor) -> bool:
    """Whether the convolution with folded parameters does what convolution and norm do, on a random input."""
    size = [2 * (kernel - 1) * dilation + 3 for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, *size, generator=generator).to(conv.weight)
    training = norm.training
    norm.eval()
    try:
        expected = nn.functional.batch_norm(
            conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        got = torch.func.functional_call(conv, {"weight": weight} | ({} if conv.bias is None else {"bias": bias}), (x,))
        if conv.bias is None:
            got = got + bias.view(-1, *[1] * len(size))
        return torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    except RuntimeError:
        return False
    finally:
        norm.train(training)
