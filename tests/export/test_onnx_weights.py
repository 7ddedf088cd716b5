"""Weights in ONNX files: their types, the casts before them, and what is stored, bit by bit."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import weight_quantizer
from lq.export import export_onnx
from tests.attachment.networks import images, quantized
from tests.export.exported import (
    assert_close,
    calibrated,
    constants,
    kinds,
    known,
    multiplied,
    nodes,
    nudged,
    relative,
    run,
    types,
    weights,
)
from tests.export.nets import OF_TORCH, convolutions, few
from tests.models import Block

pytestmark = OF_TORCH


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convolutions", {"0.weight": "INT8", "2.weight": "INT4", "5.weight": "INT4", "6.weight": "INT8"}),
        ("8 bits", dict.fromkeys(("0.weight", "2.weight", "5.weight", "6.weight"), "INT8")),
        ("2 bits", dict.fromkeys(("0.weight", "2.weight", "4.weight", "7.weight"), "INT2")),
        ("2 bits in opset 21", dict.fromkeys(("0.weight", "2.weight", "4.weight", "7.weight"), "INT4")),
        ("1 bit", dict.fromkeys(("0.weight", "2.weight", "5.weight", "6.weight"), "INT2")),
        ("2 bits with zero points", dict.fromkeys(("0.weight", "2.weight", "5.weight", "6.weight"), "UINT2")),
        ("by channel", {"0.weight": "INT4", "2.weight": "INT4", "5.weight": "INT8", "6.weight": "INT4"}),
    ],
)
def test_weights_have_the_smallest_type(name, expected, files):
    assert types(files(name).path) == expected


def test_weights_with_zero_points_are_unsigned(files):
    found = types(files("zero points").path)
    assert found["2.weight"] == found["5.weight"] == "UINT4"
    assert {kind for key, kind in found.items() if key[0] in "06"} == {"UINT8"}


def test_weights_of_16_bits(files):
    assert set(types(files("16 bits").path).values()) == {"INT16"}


# --- levels, casts and steps ------------------------------------------------------------------------------------------


def test_weights_of_8_bits_need_no_cast(files):
    assert kinds(files("8 bits").path)["Cast"] == 0
    assert kinds(files("convolutions").path)["Cast"] == 4  # two of two layers


def test_levels_of_few_bits_are_computed_as_large_ones(files):
    """A power of two for each channel, with which the largest level is over 32 and at most 64."""
    path = files("convolutions").path
    values = known(path)
    for layer in ("2", "5"):
        factors = constants(path)[f"{layer}.weight_factors"]
        assert (np.log2(factors) % 1 == 0).all() and factors.min() >= 8
        levels = values[f"{layer}.weight_int8"]
        assert np.array_equal(levels, values[f"{layer}.weight"] * factors)
        assert (np.abs(levels).reshape(len(levels), -1).max(1) > 32).all() and np.abs(levels).max() <= 64


@pytest.mark.parametrize("name", ["vit", "encoder", "block", "text"])
def test_no_weight_is_transposed_when_the_file_runs(name, files):
    path = files(name).path
    made = {node.output[0]: node for node in nodes(path)}
    behind = [made.get(node.input[0]) for node in nodes(path, "Transpose")]
    weights_ = {n.output[0] for n in nodes(path, "DequantizeLinear") if n.input[0] in known(path)}
    turned = [node for node in behind if node is not None and node.output[0] in weights_]
    assert len(turned) == (name == "text")  # the decoder's, which the embedding looks up as well
    assert kinds(path)["MatMul"] + kinds(path)["Gemm"] >= (1 if name == "text" else 5)


def test_pruned_channels_are_zero(files):
    file = files("by channel")
    assert not known(file.path)["2.weight"][0].any() and not known(file.path)["5.weight"][1].any()
    assert weight_quantizer(file.model[2]).bits.tolist() == [0, 1, 3, 4]


def test_one_step_for_a_whole_weight(tmp_path):
    model = convolutions()
    with torch.no_grad():
        model[2].weight.add_(0.1), model[5].weight.add_(0.1)
    calibrated(model, images(8), **few(4, per_channel=False, symmetric=False))
    path = tmp_path / "m.onnx"
    assert relative(export_onnx(model, images(8), path)) < 1e-3
    assert types(path)["2.weight"] == types(path)["5.weight"] == "UINT4"
    for layer, weight in lq.integer_weights(model).items():
        for value, node in multiplied(path, layer):
            np.testing.assert_allclose(value, weight.dequantize().numpy(), rtol=1e-6, err_msg=node.name)


def test_layers_of_equal_integers(tmp_path):
    """Their weights differ by a factor; torch.onnx stores equal constants of up to 1024 bytes once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight * 2)
    x = torch.randn(16, 8)
    calibrated(model, x, **few(4), first_last=None)
    assert relative(export_onnx(model, x, tmp_path / "m.onnx")) < 1e-3


def test_weights_far_from_zero(tmp_path):
    """LSQ+ may move a zero point out of the grid."""
    model = calibrated(convolutions(), images(8), **few(4, symmetric=False), first_last=None)
    with torch.no_grad():
        weight_quantizer(model[5]).zero_point[0] = -2.0
    weight_quantizer(model[5]).refresh()
    export_onnx(model, images(8), tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", images(8), plain=True)[0], model(images(8)))  # onnxruntime may round floats


def test_weights_alone_in_onnxruntime_as_it_is_written(tmp_path):
    """Its own optimizations round the input of such products to 8 bits, for which no file is to blame."""
    torch.manual_seed(0)
    model, x = nudged(Block()).eval(), torch.randn(4, 5, 8)
    calibrated(model, x, weights=weights(4), activations=None)
    export_onnx(model, x, tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x, plain=True)[0], model(x), 1e-6)


def test_two_bits_where_onnxruntime_cannot_read_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lq.export.onnx.can_read", lambda opset: opset < 25)
    model = calibrated(convolutions(), images(8), **few(2))
    report = export_onnx(model, images(), tmp_path / "m.onnx")
    assert report.opset == 21 and "int4" in report.weights and "int2" not in report.weights, report.weights
    assert "weights of 2 bits are stored in 4: this onnxruntime cannot read opset 25" in report.notes
    assert not any("2 bits" in note for note in export_onnx(quantized(), images(), tmp_path / "m.onnx").notes)
