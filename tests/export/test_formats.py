"""The table of kinds of files: what is in it is all that a new kind needs to be exported by callback and command."""

import inspect

import pytest
import torch
from torch import nn

import lq
from lq.callbacks import ExportModel, Quantize
from lq.cli import main
from lq.export.formats import FORMATS, Format, endings_with
from lq.export.program import batch_length
from tests.export.exported import run
from tests.helpers import QUIET, fit, tiny

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def build():
    """A network for --model."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def quantized():
    torch.manual_seed(0)
    return lq.calibrate(lq.attach(build(), 4, 8, first_last=None), [X]).eval()


READ = {
    ".onnx": lambda path: torch.tensor(run(path, X)[0]),
    ".pt2": lambda path: torch.export.load(path).module()(X),
    ".safetensors": lambda path: lq.load(path, build()).eval()(X),
}


@pytest.mark.parametrize("ending", FORMATS)
def test_each_kind_writes_its_own(ending, tmp_path):
    """And is read by what reads that kind; without an example, if it needs none."""
    model, path = quantized(), tmp_path / f"m{ending}"
    said = FORMATS[ending].write(model, [X] if FORMATS[ending].needs_example else [], path)
    assert str(said).startswith(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    with torch.no_grad():
        torch.testing.assert_close(READ[ending](path), model(X))


def test_names_of_kinds_are_told_apart():
    assert len({kind.name for kind in FORMATS.values()}) == len(FORMATS)


def test_options_are_arguments_of_the_callback():
    arguments = inspect.signature(ExportModel).parameters
    assert {option for kind in FORMATS.values() for option in kind.options} <= set(arguments)


def test_options_say_which_files_take_them():
    assert endings_with("opset") == ".onnx"
    assert endings_with("volume") == ""


@pytest.fixture
def made_up(monkeypatch):
    """A kind of file that holds the number of samples in the example, and takes an opset."""

    def write(model, examples, path, opset=None):
        path.write_text(f"{batch_length(examples[0])} {opset}")
        return f"{path}, a made-up file"

    monkeypatch.setitem(FORMATS, ".txt", Format("made up", write, ("opset",)))


@pytest.mark.filterwarnings(*QUIET)
def test_the_callback_writes_a_new_kind(made_up, tmp_path):
    export = ExportModel(tmp_path / "m.txt", opset=7)
    fit(tiny(), [Quantize(4, 8), export], max_epochs=0)
    assert (tmp_path / "m.txt").read_text() == "8 7"
    assert export.files == {"made up": tmp_path / "m.txt"} and export.report is None
    with pytest.raises(lq.SpecError, match=r"target='openvino'\): that is for files ending in .onnx$"):
        ExportModel(tmp_path / "m.txt", target="openvino")


def test_the_command_writes_a_new_kind(made_up, tmp_path, capsys):
    packed, out = tmp_path / "m.safetensors", tmp_path / "m.txt"
    lq.save(quantized(), packed)
    given = ("export", packed, "--model", f"{__name__}:build", "--input-size", 4, "--output", out, "--opset", 7)
    assert main([str(argument) for argument in given]) == 0
    assert capsys.readouterr().out == f"{out}, a made-up file\n"
    assert out.read_text() == "2 7"
    assert main([*map(str, given), "--target", "openvino"]) == 2
    assert f"--target is for files ending in .onnx, not --output {out}" in capsys.readouterr().err
