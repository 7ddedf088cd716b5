"""Exported files in onnxruntime: what is multiplied in integers there, and how far outputs are from the model's."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import lq
from lq.errors import DataError
from lq.export import export_onnx
from lq.export.running import can_read
from tests.attachment.networks import images
from tests.export.exported import calibrated, kinds, pictures, relative, session
from tests.export.nets import FILES, NO_EDGES, OF_TORCH, convolutions, few, of
from tests.helpers import assert_same
from tests.models import state

pytestmark = OF_TORCH


def test_a_resnet_is_computed_in_integers(files, tmp_path):
    file = files("resnet")
    session(file.path, optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    convolutions_ = sum(isinstance(m, nn.Conv2d) for m in file.model.modules())
    assert found["QLinearConv"] == convolutions_ == 15
    assert found["QLinearAdd"] == 4
    assert found["QGemm"] == 1
    assert not set(found) & {"Conv", "FusedConv", "Add", "Gemm", "MatMul", "Cast", "Mul"}
    assert (file.report.products, file.report.integer_products) == (16, 16)
    assert "in integers there: 16 of 16 convolutions and matrix products" in str(file.report)
    assert not any("computed in float" in note for note in file.report.notes)


def test_gates_and_silus_are_between_integers(files, tmp_path):
    """Every SiLU is one node, and each convolution is one of integers although none is followed by a clipping."""
    file = files("gated")
    session(file.path, optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in file.model.modules()) > 10
    assert found["QuickGelu"] == sum(isinstance(m, nn.SiLU) for m in file.model.modules()) > 5
    assert found["Sigmoid"] == sum(isinstance(m, nn.Sigmoid) for m in file.model.modules()) > 0
    assert file.report.products == file.report.integer_products
    assert kinds(file.path)["BatchNormalization"] == 0


def test_levels_that_no_sign_can_turn_are_moved(tmp_path):
    """-128 behind a BatchNorm of negative factor, in the model as in the file; only those."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)).eval()
    with torch.no_grad():
        net[2].weight[:, 0] = torch.tensor([-1.28, -1.28, 1.27]).view(-1, 1, 1)
        net[2].weight[:, 1:] *= 0.1
        net[3].weight.copy_(torch.tensor([-1.0, 1.0, -0.5]))
    x = pictures(4, 6, channels=2)
    calibrated(net, x, **few(8), **NO_EDGES)
    with torch.no_grad():
        net[2].parametrizations.weight[0].log2_step.fill_(math.log2(0.01))
    codes = lq.integer_weights(net)["2"].codes.clone()
    report = export_onnx(net, x, tmp_path / "m.onnx")
    assert kinds(tmp_path / "m.onnx")["BatchNormalization"] == 0 and relative(report) < 1e-3
    moved = lq.integer_weights(net)["2"].codes
    assert (moved != codes).sum() == 1 and moved[0, 0] - codes[0, 0] == 1
    assert sum("1 weights of level -128" in note for note in report.notes) == 1
    assert not any("-128" in note for note in export_onnx(net, x, tmp_path / "again.onnx").notes)


def test_without_integer_sums_are_computed_in_floats(tmp_path):
    model, x = of("residual")
    calibrated(model, x, **few(4))
    report = export_onnx(model, x[:2], tmp_path / "m.onnx")
    session(tmp_path / "m.onnx", optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    assert found["QLinearAdd"] == 0 and found["Add"] + found["FusedConv"] > 0
    floats = found["Conv"] + found["FusedConv"]
    assert report.products - report.integer_products == floats >= 2
    assert report.products == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    (note,) = (note for note in report.notes if "computed in float" in note)
    assert note.startswith(f"{floats - 1} convolutions") and "integer=True" in note  # the first has a float input


def test_products_of_a_transformer_are_counted(files):
    """Four layers and two products of attention in each block, the patches (in float) and the head."""
    report = files("vit").report
    blocks = len(files("vit").model.blocks)
    assert (report.products, report.integer_products) == (6 * blocks + 2, 6 * blocks + 1)
    assert "convolutions of integers" not in " ".join(report.notes)


@pytest.mark.parametrize("name", ["2 bits", "vit", "depthwise"])
def test_casts_are_done_when_the_file_is_loaded(name, files, tmp_path):
    session(files(name).path, optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    assert found["Cast"] == 0
    if name != "2 bits":  # a Min stands before its convolutions, and nobody quantizes their results
        assert found["QLinearConv"] + found["MatMulIntegerToFloat"] > 1


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_differences_are_found(files, tmp_path, monkeypatch):
    """Batches that are compared are run: a model of other outputs differs by as much."""
    file = files("convolutions")
    real = onnxruntime.InferenceSession

    class Off(real):
        def run(self, *args, **kwargs):
            outputs = super().run(*args, **kwargs)
            outputs[0][0] = np.roll(outputs[0][0], 1) + 0.5
            return outputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    batches = (file.x[i : i + 2] for i in range(0, 8, 2))
    report = export_onnx(file.model, file.x[:2], tmp_path / "m.onnx", check=batches)
    assert report.samples == 8 and report.largest_difference >= 0.5
    assert report.agreement < 1
    assert f"same top-1 on {100 * report.agreement:.2f} %" in str(report)


def test_which_opsets_onnxruntime_reads():
    assert can_read(17) and not can_read(99)


def test_without_onnxruntime_nothing_is_compared(files, tmp_path, monkeypatch):
    file = files("convolutions")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    report = export_onnx(file.model, file.x[:2], tmp_path / "m.onnx")
    assert report.samples == 0 and report.largest_difference is None
    assert "not compared: onnxruntime is not installed" in report.notes
    assert (tmp_path / "m.onnx").read_bytes() == file.path.read_bytes()


def test_a_file_that_onnxruntime_does_not_run_is_not_written(tmp_path, monkeypatch):
    """And the model stays as it is."""

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel for that")

    model = calibrated(convolutions(), images(8), **FILES["convolutions"][1])
    before = state(model)
    (tmp_path / "m.onnx").write_bytes(b"old")
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    message = "^onnxruntime cannot run the exported Sequential: no kernel for that$"
    with pytest.raises(DataError, match=message):
        export_onnx(model, images(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert_same(state(model), before)
