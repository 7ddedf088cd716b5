"""Targets in a Trainer: what an engine does not run is an error before the first step, files are for the engine."""

import json

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

import lq
from lq.callbacks import AllocateBits, ExportModel, FineTune, Quantize
from lq.errors import DataError, NoEffectWarning, SpecError
from tests.helpers import QUIET, fit, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def zero_types(path):
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_the_file_is_for_the_engine_that_was_quantized_for(tmp_path):
    module, export = tiny(), ExportModel(tmp_path / "m.onnx", input_names=["image"], output_names=["scores"])
    fit(module, [Quantize(8, 8, integer=True, target="tensorrt"), FineTune("lsq"), export], max_epochs=1)
    assert zero_types(tmp_path / "m.onnx") == {TensorProto.INT8}
    assert export.report.opset == 20 and export.report.notes[0].startswith("written for tensorrt by its documents")
    assert json.loads((tmp_path / "m.report.json").read_text())["opset"] == 20
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input] == ["image"]


def test_a_file_for_another_engine(tmp_path):
    module, free = tiny(), ["batch", "height", "width"]
    exports = [
        ExportModel(tmp_path / "o.onnx", target="openvino", dynamic=free),
        ExportModel(tmp_path / "q.safetensors"),
    ]
    fit(module, [Quantize(8, 8, integer=True, target="tensorrt"), *exports], max_epochs=0)
    assert zero_types(tmp_path / "o.onnx") == {TensorProto.UINT8}
    dims = onnx.load(tmp_path / "o.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dims] == ["batch", "", "height", "width"]
    assert (tmp_path / "q.safetensors").is_file()


@pytest.mark.parametrize("dynamic", ["width", ["batch", "height"]])
def test_sizes_that_cannot_be_free_are_told_before_training(tmp_path, dynamic):
    module = tiny()
    module.net[6] = nn.AvgPool2d(3)  # as many values as the linear layer takes, of images of 6 pixels alone
    given = [Quantize(8, 8), FineTune(), ExportModel(tmp_path / "m.onnx", dynamic=dynamic)]
    said = (
        r"(width|height) cannot be free, Sequential does not run on images of twice the size \(RuntimeError: .*dynamic="
    )
    with pytest.raises(DataError, match=said):
        fit(module, given, max_epochs=1)
    assert not module.seen
    torch.manual_seed(0)
    fit(module, [*given[:2], ExportModel(tmp_path / "m.onnx")], max_epochs=1)
    assert (tmp_path / "m.onnx").is_file()


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda path: [Quantize(8, 4, target="tensorrt")],
        lambda path: [Quantize(8, 8, symmetric=False, target="tensorrt")],
        lambda path: [Quantize(8, 8), ExportModel(path, target="tensorrt")],
    ],
)
@pytest.mark.filterwarnings("ignore:target='tensorrt' computes a part")
def test_what_is_refused_is_refused_before_training(callbacks, tmp_path):
    module = tiny()
    with pytest.raises(SpecError, match=r"^target='tensorrt' does not run this network: \d .* use "):
        fit(module, callbacks(tmp_path / "m.onnx"), max_epochs=1)
    assert not module.seen and not list(tmp_path.glob("*.onnx"))


def test_widths_that_are_allocated_are_looked_at_before_training():
    module = tiny()
    allocate = AllocateBits(budget="8x", activations=4.0, samples=16)
    with pytest.raises(SpecError, match=r"^target='tensorrt' does not run this network: .* other widths than 8 bits"):
        fit(module, [Quantize(8, 8, integer=True, target="tensorrt"), allocate], max_epochs=1)
    assert not module.seen


def test_what_is_computed_in_float_is_a_warning():
    with pytest.warns(
        NoEffectWarning, match=r"^target='openvino' computes a part of this network in float.*integer=Tr"
    ):
        fit(tiny(), [Quantize(8, 8, target="openvino")], max_epochs=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "openvino"}, "target='openvino'"),
        ({"opset": 21}, "opset=21"),
        ({"dynamic": ["batch", "width"]}, r"dynamic=\['batch', 'width'\]"),
        ({"input_names": ["x"]}, r"input_names=\['x'\]"),
        ({"output_names": ["y"]}, r"output_names=\['y'\]"),
    ],
)
def test_options_of_onnx_for_other_files(options, said):
    with pytest.raises(SpecError, match=rf"^ExportModel\('m.pt2', {said}\): that is for files ending in .onnx$"):
        ExportModel("m.pt2", **options)


def test_unknown_targets():
    for make in (lambda: Quantize(8, 8, target="onnx"), lambda: ExportModel("m.onnx", target="onnx")):
        with pytest.raises(SpecError, match=r"^target='onnx' is unknown; use onnxruntime, openvino or tensorrt$"):
            make()


def test_a_recipe_takes_a_target():
    assert lq.recipe("ptq_w8a8", target="openvino")[0].target == "openvino"
