"""lq inspect: the structure of a model, and the layers of a quantized one."""

import json

import pytest
import timm
import torch

import lq
from lq.structure.structure import Structure
from tests.cli.running import complains, succeeds


def test_the_structure_of_a_model(tmp_path, capsys):
    out = tmp_path / "structure.json"
    said = succeeds(capsys, "inspect", "test_resnet", "--input-size", "3", "32", "32", "--json", out)
    torch.manual_seed(0)
    expected = lq.inspect(timm.create_model("test_resnet").eval(), torch.randn(2, 3, 32, 32))
    assert said == f"{expected}\n"
    assert Structure.load(out).sites == expected.sites


@pytest.mark.parametrize("name", ["q.safetensors", "q.pth"])
def test_the_layers_of_a_quantized_model(name, tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=10)
    lq.calibrate(lq.attach(model, 4, 8), [torch.randn(2, 3, 32, 32)])
    path, out = tmp_path / name, tmp_path / "summary.json"
    lq.save(model, path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    given = ["--model-args", "num_classes=10", "--input-size", "3", "32", "32", "--source", path, "--json", out]
    said = succeeds(capsys, "inspect", "test_resnet", *given)
    expected = lq.summary(model, torch.randn(2, 3, 32, 32))
    assert expected.total() in said and "layer1.0.conv1" in said
    assert json.loads(out.read_text())["bitops"] == expected.bitops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt18"], "lq inspect: MODEL resnt18: Unknown model (resnt18); .* module:function; did you mean resnet18"),
        (["test_resnet", "--source", "no.safetensors"], "lq inspect: there is no file no.safetensors"),
        (["test_resnet", "--json", "no/s.json"], "lq inspect: no/s.json cannot be written: No such file"),
        (["test_resnet", "--input-size", "4"], "lq inspect: "),
    ],
)
def test_errors(arguments, message, capsys):
    start, _, rest = message.partition(".*")
    said = complains(capsys, "inspect", *arguments)
    assert said.startswith(start) and rest in said
