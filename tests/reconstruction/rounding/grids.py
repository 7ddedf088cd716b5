"""Layers with every kind of grid that weights have, for the tests of roundings."""

import torch
from torch import nn

import lq
from lq.attachment.sites import float_weight, weight_quantizer
from lq.reconstruction.rounding import WeightGrid

CASES = {
    "one width": (lambda: nn.Linear(7, 5), {"weights": 3}),
    "zero points": (lambda: nn.Linear(7, 5), {"weights": 3, "symmetric": False}),
    "two levels at half steps": (lambda: nn.Linear(7, 5), {"weights": 1}),
    "a width for each channel": (
        lambda: nn.Conv2d(3, 6, 3),
        {"weights": lq.QuantSpec((0, 1, 2, 3, 4, 8), signed=True)},
    ),
    "zero points and widths": (
        lambda: nn.Conv2d(3, 6, 3),
        {"weights": lq.QuantSpec((0, 1, 2, 3, 4, 8), symmetric=False, signed=True)},
    ),
    "one step": (lambda: nn.Conv2d(3, 4, 3), {"weights": lq.QuantSpec(3, per_channel=False, signed=True)}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), {"weights": 2}),
    "transposed, in groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        {"weights": lq.QuantSpec((0, 1, 2, 3, 4, 8), signed=True)},
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), {"weights": 2}),
}


def quantized(case, seed=0):
    """The layer of a case, with a quantizer on its weight."""
    make, options = CASES[case]
    torch.manual_seed(seed)
    return lq.attach(nn.Sequential(make()), first_last=None, **options).eval()[0]


def pair(layer):
    """The quantizer of a layer's weight, and the float weight."""
    return weight_quantizer(layer), float_weight(layer)


def grid_of(*layers):
    """The grid of the weights of layers."""
    return WeightGrid([pair(layer) for layer in layers])


def channel_rows(layer, weight):
    """A weight as one row per output channel, by a loop that knows torch's layouts and nothing of lq's."""
    weight = weight.detach()
    if not isinstance(layer, nn.ConvTranspose2d):
        return list(weight)
    inside, outside = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return [weight[g * inside : (g + 1) * inside, o] for g in range(layer.groups) for o in range(outside)]


def inside(layer):
    """Where a weight is within the range of its grid, in its shape; zero bits have no range."""
    quantizer, weight = pair(layer)
    found = torch.zeros_like(weight, dtype=torch.bool)
    rows, marks = channel_rows(layer, weight), channel_rows(layer, found)
    bits, zero, step = (p.detach().expand(len(rows)) for p in (quantizer.bits, quantizer.zero_point, quantizer.step))
    for row, mark, b, z, s in zip(rows, marks, bits, zero, step, strict=True):
        mark.copy_((row / s >= -z) & (row / s <= 2**b - 1 - z) & (b > 0))
    return found
