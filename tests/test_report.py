"""The summary against sizes and operations counted by hand."""

import json

import pytest
import torch
from torch import nn

import lq


def test_sizes_and_operations_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10, bias=False))
    lq.attach(model, weights=4, activations=8, first_last=None)
    assert lq.summary(model).bitops is None
    lq.calibrate(model, [torch.randn(5, 3, 8, 8)])
    found = lq.summary(model)
    conv = 8 * 27 * 4 // 8 + 8 * 4 + 8 * 4
    linear = 10 * 288 * 4 // 8 + 10 * 4 + 2 * 4
    assert [layer.bytes for layer in found.layers] == [conv, linear]
    assert found.bytes == conv + linear
    assert found.float_bytes == 4 * (8 * 27 + 8 + 10 * 288)
    assert found.bitops == 8 * 27 * 36 * 4 * 32 + 2880 * 4 * 8
    assert found.average_bits == 4
    assert found.compression == pytest.approx(found.float_bytes / found.bytes)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["kind"] == "Conv2d"
    assert "3x3" in str(found)
    assert lq.summary(model, torch.randn(2, 3, 8, 8)).bitops == found.bitops


def test_average_bits_weigh_channels_by_size() -> None:
    model = lq.attach(nn.Sequential(nn.Linear(4, 4, bias=False)), 4, first_last=None)
    lq.set_bits(model, {"0": [8, 0, 0, 0]})
    found = lq.summary(model)
    assert found.average_bits == 2
    assert found.layers[0].weight_bits == (0, 8)
    assert found.bytes == 4 * 8 // 8 + 4 * 4
