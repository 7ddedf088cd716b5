"""Packed files take no more than the widths of what is in them."""

import pytest
import timm
import torch
from torch import nn

import lq
from lq.attachment.sites import float_weight, weight_quantizer
from tests.attachment.networks import quantized
from tests.export.files import QUIETLY, grids, integers
from tests.helpers import assert_same

pytestmark = QUIETLY


@pytest.fixture(scope="module")
def large():
    """A network of 11.7 million weights, BatchNorms folded, and the bytes of what is not quantized."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", zero_init_last=False).eval()
    lq.fold_batchnorm(model)
    lq.attach(model, lq.QuantSpec(4, range="minmax"), first_last=None)
    left = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.endswith("bias"))
    return model, left


def least_size(model, left):
    """Bytes of codes, of a step for each channel that is kept, and of the rest."""
    codes = kept = 0
    for part in model.modules():
        if (quantizer := weight_quantizer(part)) is not None:
            weight = float_weight(part)
            codes += int(quantizer.bits.detach().sum()) * (weight.numel() // weight.shape[0])
            kept += int((quantizer.bits > 0).sum())
    return codes / 8 + 4 * kept + left


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_widths_take_their_bits(bits, large, tmp_path):
    model, left = large
    lq.set_bits(model, {"*": bits})
    least = least_size(model, left)
    assert 11e6 * bits / 8 < least
    assert least < lq.save(model, tmp_path / "m.safetensors") <= 1.01 * least


def mix(model, widths):
    """Give each channel one of `widths`, in turn at random."""
    generator = torch.Generator().manual_seed(0)
    for name, part in model.named_modules():
        if weight_quantizer(part) is not None:
            channels = weight_quantizer(part).bits.numel()
            drawn = torch.randint(0, len(widths), (channels,), generator=generator).tolist()
            lq.set_bits(model, {name: [widths[i] for i in drawn]})


def test_a_width_for_each_channel_takes_its_bits(large, tmp_path):
    model, left = large
    mix(model, [2, 3, 4])
    size = lq.save(model, tmp_path / "m.safetensors")
    assert size <= 1.01 * least_size(model, left)
    torch.manual_seed(1)
    loaded = lq.load(tmp_path / "m.safetensors", timm.create_model("resnet18").eval())
    assert_same(integers(loaded), integers(model))
    assert_same(grids(loaded), grids(model))


def test_pruned_channels_take_nothing(large, tmp_path):
    model, left = large
    lq.set_bits(model, {"*": 3})
    whole, least = lq.save(model, tmp_path / "whole.safetensors"), least_size(model, left)
    for name, part in model.named_modules():
        if weight_quantizer(part) is not None:
            lq.set_bits(model, {name: [3, 0] * (weight_quantizer(part).bits.numel() // 2)})
    half, least_half = lq.save(model, tmp_path / "half.safetensors"), least_size(model, left)
    assert least - least_half > 0.49 * 11.6e6 * 3 / 8
    assert abs((whole - half) - (least - least_half)) <= 100


def test_half_of_the_channels_of_a_small_model(tmp_path):
    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)), 3, first_last=None)
    whole = lq.save(model, tmp_path / "whole.safetensors")
    lq.set_bits(model, {"0": [3, 0] * 32})
    assert abs(whole - lq.save(model, tmp_path / "half.safetensors") - 32 * (64 * 3 // 8 + 4)) <= 100


def test_activations_take_a_step_and_a_byte(tmp_path):
    first = lq.save(quantized(activations=None), tmp_path / "a.safetensors")
    second = lq.save(quantized(activations=8), tmp_path / "b.safetensors")
    assert 3 * 4 <= second - first <= 3 * 5 + 60
