"""lq compare: the planted culprit is first, the numbers are those of the function, files are written."""

import csv

import pytest
import torch

import lq
from lq.cli.data import DigitsData
from lq.cli.timm_module import TimmClassifier
from tests.cli.running import SILENT, complains, succeeds

pytestmark = SILENT

DATA = ("--data", "DigitsData", "--data.image_size", "16", "--data.batch_size", "16")
MODEL = ("--model", "test_resnet", "--model-args", "num_classes=10")
CULPRIT = "layer2.0.conv1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and a packed file of a network with one layer of 2 bits, and its float weights."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    module = TimmClassifier("test_resnet", num_classes=10)
    torch.save(module.model.state_dict(), folder / "float.pth")
    data = DigitsData(image_size=16, batch_size=16, data_config=module.data_config)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model, example = module.model.eval(), batch[0][:2]
    lq.fold_batchnorm(model, example)
    options = {"structure": lq.inspect(model, example), "overrides": {CULPRIT: {"weights": 2}}}
    lq.calibrate(lq.attach(model, 8, 8, **options), [batch])
    torch.save({"state_dict": module.state_dict()}, folder / "m.ckpt")
    lq.save(model, folder / "m.safetensors")
    return folder


@pytest.mark.parametrize(("source", "floats"), [("m.ckpt", False), ("m.ckpt", True), ("m.safetensors", True)])
def test_the_culprit_is_first(source, floats, files, tmp_path, capsys):
    out = tmp_path / "layers.csv"
    more = ["--reference", files / "float.pth"] if floats else []
    arguments = [files / source, *MODEL, *DATA, "--samples", "20", "--most", "3", "--out", out, *more]
    said = succeeds(capsys, "compare", *arguments)
    assert "give the float ones by --reference" not in said
    lines = said.splitlines()
    assert lines[0].startswith("layer") and lines[1].startswith(CULPRIT) and "W2" in lines[1]
    assert "20 samples" in lines[4] and "13 more layers that lose less" in said
    rows = list(csv.DictReader(out.open()))
    assert rows[0]["layer"] == CULPRIT and len(rows) == 16


def test_the_numbers_are_those_of_the_function(files, tmp_path, capsys):
    out = tmp_path / "layers.json"
    arguments = [files / "m.safetensors", *MODEL, *DATA, "--samples", "20", "--seed", "3", "--out", out]
    said = succeeds(capsys, "compare", *arguments)
    found = lq.Comparison.from_json(out.read_text())
    assert said.rstrip("\n") == str(found.table())
    assert found.notes[-1].endswith("which lose nothing by being rounded: give the float ones by --reference")
    module = TimmClassifier("test_resnet", num_classes=10)
    data = DigitsData(image_size=16, batch_size=16, data_config=module.data_config)
    data.setup("fit")
    torch.manual_seed(3)
    loader = iter(data.train_dataloader())
    first, second = next(loader), next(loader)
    model = lq.load(files / "m.safetensors", module.model).eval()
    expected = lq.compare(model, [first, tuple(part[:4] for part in second)])
    assert found.samples == expected.samples == 20
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.name == other.name and one.alone.sqnr == pytest.approx(other.alone.sqnr, abs=1e-3)


def test_float_weights_of_before(files, tmp_path, capsys):
    """Weights that are levels already lose nothing against themselves; against those of before, they do."""
    found = {}
    for name, more in {"own": [], "before": ["--reference", files / "float.pth"]}.items():
        out = tmp_path / f"{name}.json"
        succeeds(capsys, "compare", files / "m.safetensors", *MODEL, *DATA, "--out", out, *more)
        found[name] = lq.Comparison.from_json(out.read_text())[CULPRIT].alone.sqnr
    assert found["before"] < 20 < found["own"]


def test_a_plot(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    succeeds(capsys, "compare", files / "m.ckpt", *MODEL, *DATA, "--samples", "4", "--out", tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.ckpt", *MODEL, *DATA], "lq compare: there is no file no.ckpt"),
        (["float.pth", *MODEL, *DATA], "lq compare: {folder}/float.pth"),
        (["m.ckpt", *MODEL], "lq compare: "),
        (["m.ckpt", *DATA], "lq compare: "),
        (["m.ckpt", *MODEL, *DATA, "--out", "a.txt"], "lq compare: --out a.txt: the name should end in one of .csv, "),
        (["m.ckpt", *MODEL, *DATA, "--most", "0"], "lq compare: --most 0: expected 1 or more"),
        (["m.ckpt", *MODEL, *DATA, "--samples", "0"], "lq compare: --samples 0: expected 1 or more"),
        (["m.ckpt", *MODEL, "--data", "DigitData"], "lq compare: --data DigitData: there is no such data module; did"),
        (
            ["m.ckpt", "--model", "test_resnt", *DATA],
            "lq compare: --model test_resnt: Unknown model (test_resnt); give",
        ),
        (["m.ckpt", "--model", "test_vit", *DATA], "lq compare: {folder}/m.ckpt"),
        (["m.ckpt", *MODEL, *DATA, "--reference", "no.pth"], "lq compare: there is no file no.pth"),
        (["m.ckpt", *MODEL, *DATA, "--what"], "lq compare: "),
    ],
)
def test_errors(arguments, message, files, capsys):
    source = files / arguments[0] if (files / arguments[0]).is_file() else arguments[0]
    said = complains(capsys, "compare", source, *arguments[1:])
    assert said.startswith(message.format(folder=files))


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        succeeds(capsys, "compare", "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "For example: lq compare model.ckpt --model resnet18 --data ImageFolderData" in said
