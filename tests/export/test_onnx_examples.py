"""Models to export as ONNX of all types, with inputs by name, sizes of batches, and batches to check."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lq
from lq.export import export_onnx
from lq.export.program import exported
from lq.export.standard import standard_form
from tests.export.exported import (
    Pairs,
    assert_close,
    calibrated,
    dynamic,
    nudged,
    pictures,
    relative,
    run,
    session,
    stored_name,
    types,
)
from tests.export.nets import OF_TORCH, few, upwards
from tests.models import Residual, example

pytestmark = OF_TORCH


# --- types of models --------------------------------------------------------------------------------------------------


def test_a_model_in_training_mode_and_half_precision(tmp_path):
    """The check runs in eval mode, the model goes on training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4)).half()
    x = torch.randn(8, 8).half()
    calibrated(model, x, **few(4), first_last=None)
    report = export_onnx(model.train(), x, tmp_path / "m.onnx")
    assert model.training and relative(report) < 2e-3  # half a unit in the last place of float16, and some
    assert run(tmp_path / "m.onnx", x)[0].dtype == np.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_types_that_engines_lack_are_exported_in_float32(dtype, tmp_path):
    """With the integers of the model, and as near to it as its own type rounds."""
    model, x = example("encoder")
    model, x = model.to(dtype), x.to(dtype)
    calibrated(model, x, **few(4), first_last=None)
    expected, path = model(x).detach().double().numpy(), tmp_path / "m.onnx"
    report = export_onnx(model, x, path)
    assert {p.dtype for p in model.parameters() if p.ndim > 1} == {dtype}
    assert f"the file computes in float32, where the model does in {str(dtype)[6:]}" in report.notes
    found = run(path, x.float())[0]
    assert found.dtype == np.float32 and report.samples == len(x)
    bound = 0.2 if dtype == torch.bfloat16 else 0.05  # eight bits, of activations of few levels
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()
    assert {k for n, k in types(path).items() if "linear1" in n or n.endswith("_weight")} == {"INT4"}


class ByKernels(nn.Module):
    """A kernel for each sample, of a bank of kernels: dynamic convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.route, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2), nn.Linear(6, 3)
        self.bank = nn.Parameter(torch.randn(2, 6 * 4 * 9) / 5)

    def forward(self, x):
        x = self.stem(x).relu()
        samples, channels, *size = x.shape
        kernels = (self.route(x.mean((2, 3))).softmax(-1) @ self.bank).view(samples * 6, 4, 3, 3)
        x = nn.functional.conv2d(x.reshape(1, samples * channels, *size), kernels, padding=1, groups=samples)
        return self.head(x.view(samples, 6, *size).relu().mean((2, 3)))


def test_kernels_of_each_sample_have_the_batch_size_of_the_example(tmp_path):
    """ONNX's convolutions have a fixed number of groups; that is said, and larger batches are compared in pieces."""
    torch.manual_seed(0)
    model, x = ByKernels().eval(), torch.randn(8, 3, 6, 6)
    calibrated(model, x, **few(8), first_last=None)
    refused = exported(standard_form(model), x[:3])[1]  # older torch makes no program for any number of samples
    reason = refused or "a convolution has a group for each sample"
    report = export_onnx(model, x[:3], tmp_path / "m.onnx", check=[x])
    assert f"the batch size is fixed: {reason}; it is the example's, 3 (example=)" in report.notes
    assert report.samples == 6 and relative(report) < 0.02
    assert types(tmp_path / "m.onnx")["matmul_0_right_weight"] == "INT8"


# --- inputs and batches -----------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two tensors of the same shape, which are no equals."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, other, scale=1.0):
        x = self.fc(x - 3 * other)
        return {"logits": x * scale, "sum": x.sum(1)}


def two():
    torch.manual_seed(0)
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    model = lq.attach(Two(), 8, 8, first_last=None)
    return lq.calibrate(model, [(x, other)], forward=lambda m, b: m(*b)).eval(), x, other


def test_inputs_by_name_in_any_order_and_several_outputs(tmp_path):
    model, x, other = two()
    check = [{"other": other, "x": x}, {"x": -x, "other": other}]
    report = export_onnx(model, check[0], tmp_path / "m.onnx", check=check)
    assert report.samples == 6 and relative(report) < 1e-5
    assert {value.name for value in onnx.load(tmp_path / "m.onnx").graph.input} == {"x", "other"}
    found = session(tmp_path / "m.onnx").run(None, {"x": x.numpy(), "other": other.numpy()})
    expected = model(x, other)
    assert_close(found[0], expected["logits"]), assert_close(found[1], expected["sum"])


def test_inputs_by_name_beside_a_number(tmp_path):
    model, x, other = two()
    check = [{"other": other, "x": x, "scale": 2.0}, {"x": -x, "other": other, "scale": 2.0}]
    assert relative(export_onnx(model, check[0], tmp_path / "m.onnx", check=check)) < 1e-5


def test_residual_sums_in_the_outermost_forward(tmp_path):
    torch.manual_seed(0)
    model = calibrated(nudged(Residual()), pictures(), **few(4), integer=True)
    report = export_onnx(model, pictures(1), tmp_path / "m.onnx", check=[pictures(1), pictures(5)])
    assert report.samples == 6 and relative(report) < 1e-3
    assert dynamic(tmp_path / "m.onnx") and not any("fixed" in note for note in report.notes)


def test_transposed_convolutions_in_groups(tmp_path):
    """No operator knows their channels: weights are floats. onnxruntime may round them to one step."""
    model, x = upwards(groups=2)
    calibrated(model, x, **few(4))
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.weights == {"int8": 116, "int4": 96}
    assert stored_name(tmp_path / "m.onnx", "4") is None
    assert_close(run(tmp_path / "m.onnx", x, plain=True)[0], model(x))


def test_a_fixed_batch_size_is_noted(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = lq.calibrate(lq.attach(Pairs(), 4, 8, first_last=None), [x]).eval()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert not dynamic(tmp_path / "m.onnx") and relative(report) < 1e-5
    assert report.notes[0].startswith("the batch size is fixed: ")
