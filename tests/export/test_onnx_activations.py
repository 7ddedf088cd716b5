"""Activations in ONNX files: their limits, and what is noted of their widths."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import lq
from lq.export import export_onnx
from tests.export.exported import activations, assert_close, biases, calibrated, kinds, limits_of_codes, relative, run
from tests.export.nets import OF_TORCH, few, of
from tests.models import example

pytestmark = OF_TORCH


@pytest.mark.parametrize(("name", "bits"), [("convolutions", 4), ("2 bits", 4), ("1 bit", 2), ("block", 5)])
def test_activations_never_have_more_levels_than_they_have_bits_for(name, bits, files):
    """However large the input: what flows behind each Clip of codes."""
    file = files(name)
    model = onnx.load(file.path)
    limits = limits_of_codes(file.path)
    assert limits
    for node in limits:
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None))
    found = run(model, 30 * torch.cat([file.x, -file.x]), plain=True)[1:]
    assert len(found) == len(limits)
    for codes in found:
        assert codes.dtype == np.uint8 and codes.max() <= 2**bits - 1
    assert max(np.unique(codes).size for codes in found) > 2 ** (bits - 1)
    assert max(codes.max() for codes in found) == 2**bits - 1


def test_16_bits_are_noted(files):
    note = "3 activations of 16 bits: onnxruntime computes what reads them in float"
    assert note in files("16 bits").report.notes
    assert not any("16 bits" in note for note in files("8 bits").report.notes)


def test_biases_of_16_bit_layers_are_added_apart(files):
    """onnxruntime makes integers of biases in layers, which would overflow at such steps."""
    file = files("16 bits")
    assert kinds(file.path)["Add"] == 3 and not list(biases(file.path))
    assert_close(run(file.path, file.x, plain=True)[0], file.model(file.x))
    assert_close(run(file.path, file.x)[0], file.model(file.x))


def test_narrow_activations_are_noted(files):
    assert (
        "activations with other widths than 8 are 8-bit integers, limited to their levels: 2 of 4 bits"
        in files("convolutions").report.notes
    )
    assert not any("limited" in note for note in files("8 bits").report.notes)


def test_weights_of_functions_are_noted(files):
    assert not any("functions" in note for name in ("vit", "encoder", "text") for note in files(name).report.notes)


def test_weights_that_functions_compute_are_noted(tmp_path):
    model, x = example("odd weights")
    calibrated(model, x, **few(4), first_last=None)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    note = next(note for note in report.notes if "functions" in note)
    assert note.startswith("2 weights of functions are stored in float: ")
    assert "conv.conv2d_0_weight (no parameter as it is" in note and note.endswith("rounded where they are used")
    assert relative(report) < 1e-3


# --- layers of which only one side is quantized -----------------------------------------------------------------------


def test_float_weights_beside_quantized_activations(tmp_path):
    """Which onnxruntime rounds by itself."""
    model, x = of("residual")
    calibrated(model, x, weights=None, activations=activations(8), integer=True)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x, plain=True)[0], model(x))
    assert relative(report) < 1e-3 or any("float" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ({"activations": None}, "inputs of 0, 2 are float"),
        ({"activations": 8}, "inputs of 0 are float"),
        ({"activations": 8, "integer": True}, None),
    ],
)
def test_float_inputs_of_integer_weights_are_told(options, listed, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(32, 6, 16)
    lq.attach(model, 8, structure=lq.inspect(model, x), first_last=None, **options)
    report = export_onnx(lq.calibrate(model, [x]), x, tmp_path / "m.onnx")
    found = [note.split(":")[0] for note in report.notes if note.startswith("inputs of")]
    assert found == ([] if listed is None else [listed])
    if listed is None:  # nothing is left for onnxruntime to round
        assert report.largest_difference < 1e-5
