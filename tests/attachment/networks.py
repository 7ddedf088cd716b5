"""Layers of every kind and a small network to attach quantizers to, and what is compared of them."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import input_quantizer, quantized_layers, weight_quantizer

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 8, 8)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "transposed2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed2d depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 3, groups=2), (2, 4, 5, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (3, 4)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
}

every_layer = pytest.mark.parametrize("kind", LAYERS)


def layer_and_input(kind, seed=0):
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    return make(), torch.randint(0, 7, (3,)) if shape is None else torch.randn(shape)


def small(seed=0):
    """A network with first, middle and last layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)
    )


def images(n=4, seed=1):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def quantized(**options):
    """A calibrated network in eval mode."""
    options = {"weights": 4, "activations": 8, **options}
    return lq.calibrate(lq.attach(small(), **options), [images(16, 2)]).eval()


def identity(model):
    """Everything that detach has to give back."""
    return (
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        list(model.state_dict()),
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, type(module)) for name, module in model.named_modules()],
        [(len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks)) for m in model.modules()],
    )


def assert_identical(now, before):
    assert now[0] == before[0]
    assert now[1] == before[1]
    assert all(torch.equal(now[2][key], value) for key, value in before[2].items())
    assert now[3:] == before[3:]


def widths_of(model):
    """Widths of weight and input by layer name."""
    found = {}
    for name, module in quantized_layers(model):
        weight, site = weight_quantizer(module), input_quantizer(module)
        found[name] = (weight and int(weight.bits.flatten()[0]), site and int(site.bits))
    return found


def channel(layer, weight, c):
    """The part of a weight that makes output channel `c`; rows of an embedding."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight[c]
    per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    group = c // per_group
    return weight[group * inputs : (group + 1) * inputs, c % per_group]
