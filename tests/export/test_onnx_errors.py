"""What ONNX export refuses, and what it leaves behind: nothing."""

import pytest
import torch
from torch import nn

import lq
from lq.errors import DataError, StateError
from lq.export import export_onnx
from tests.attachment.networks import images, quantized, small
from tests.export.exported import calibrated
from tests.export.nets import OF_TORCH, convolutions, few

pytestmark = OF_TORCH


@pytest.mark.parametrize("opset", [13, 20])
def test_an_opset_without_small_types(opset, tmp_path):
    message = rf"^opset={opset}: types of 4 bits need 21 or more, those of 2 bits 25; .* would be stored in 8 bits"
    with pytest.raises(DataError, match=message):
        export_onnx(quantized(), images(), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [0, 9, 12])
def test_an_opset_without_steps_for_channels(opset, tmp_path):
    with pytest.raises(DataError, match=rf"^opset={opset}: steps for each channel need 13 or more$"):
        export_onnx(quantized(), images(), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_an_opset_that_there_is_not(tmp_path):
    model = calibrated(convolutions(), images(8), **few(8))
    with pytest.raises(DataError, match=r"^opset=99: the newest that this version of onnx knows is \d\d$"):
        export_onnx(model, images(), tmp_path / "m.onnx", opset=99)
    assert not list(tmp_path.iterdir())


class Bessel(nn.Sequential):
    """A function that ONNX does not have."""

    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


def test_functions_that_onnx_does_not_have(tmp_path):
    model = calibrated(Bessel(nn.Linear(4, 3)), torch.randn(3, 4), **few(4))
    with pytest.raises(DataError, match="^torch.onnx cannot export Bessel: "):
        export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (small, StateError, "^export needs a model with quantizers, Sequential has none"),
        (lambda: lq.attach(small(), 4, 8), StateError, "has no range yet: run lq.calibrate"),
    ],
    ids=["float", "not calibrated"],
)
def test_models_that_are_not_ready(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model(), images(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = rf"^ONNX export needs {package}; pip install 'lq-lightning\[export\]'$"
    with pytest.raises(StateError, match=message):
        export_onnx(quantized(), images(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
