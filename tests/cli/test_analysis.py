"""lq sensitivity and lq allocate: the numbers are those of the functions, the front falls, files can be used."""

import json

import pytest
import torch

import lq
from lq.callbacks import AllocateBits, Quantize
from lq.cli.data import DigitsData
from lq.cli.timm_module import TimmClassifier
from lq.sensitivity import Sensitivity
from tests.cli.running import SILENT, complains, succeeds
from tests.helpers import trainer

pytestmark = SILENT

DATA = ("--data", "DigitsData", "--data.image_size", "16", "--data.batch_size", "16", "--samples", "40")
MODEL = ("test_resnet", "--model-args", "num_classes=10")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose residual branches count: timm begins with those that do nothing."""
    torch.manual_seed(0)
    module = TimmClassifier("test_resnet", num_classes=10)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.0)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(module.model.state_dict(), path)
    return path


def test_sensitivity_is_that_of_the_function(weights, tmp_path, capsys):
    out = tmp_path / "s.json"
    said = succeeds(capsys, "sensitivity", *MODEL, "--checkpoint", weights, *DATA, "--json", out, "--seed", "3")
    found = Sensitivity.from_json(out.read_text())
    assert said.rstrip("\n") == str(found) and found.samples == 40

    module = TimmClassifier("test_resnet", num_classes=10, checkpoint=weights)
    data = DigitsData(image_size=16, batch_size=16, data_config=module.data_config)
    data.setup("fit")
    torch.manual_seed(3)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(3), strict=False)]
    batches[-1] = tuple(part[:8] for part in batches[-1])
    model, example = module.model.eval(), batches[0][0][:2]
    lq.fold_batchnorm(model, example)
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, example)), batches)
    expected = lq.measure_sensitivity(model, batches)
    assert [t.name for t in found.tensors] == [t.name for t in expected.tensors]
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_weights_alone(weights, tmp_path, capsys):
    out = tmp_path / "s.json"
    succeeds(capsys, "sensitivity", *MODEL, "--checkpoint", weights, *DATA, "--json", out, "--activations", "false")
    assert {tensor.role for tensor in Sensitivity.from_json(out.read_text()).tensors} == {"weight"}


def test_the_front(weights, tmp_path, capsys):
    out, folder = tmp_path / "front.json", tmp_path / "allocations"
    budgets = ("--budgets", "16x", "8x", "6x", "3.0")
    said = succeeds(
        capsys, "allocate", *MODEL, "--checkpoint", weights, *DATA, *budgets, "--json", out, "--allocations", folder
    )
    content = json.loads(out.read_text())
    assert (content["model"], content["metric"], content["samples"]) == ("test_resnet", "Fisher", 40)
    points = {point["budget"]: point for point in content["front"]}
    assert list(points) == ["16x", "8x", "6x", "3.0"]
    assert points["16x"]["loss"] > points["3.0"]["loss"] > points["8x"]["loss"] > points["6x"]["loss"] > 0
    assert points["16x"]["bytes"] < points["3.0"]["bytes"] < points["8x"]["bytes"] < points["6x"]["bytes"]
    assert points["3.0"]["average_bits"] <= 3.0 and points["16x"]["average_bits"] <= 2.0
    assert all(point["bound"] <= point["loss"] * (1 + 1e-9) for point in points.values())
    assert [line.split()[0] for line in said.splitlines()[1:5]] == list(points)
    assert all(f"{point['loss']:.3e}" in said for point in points.values())
    saved = json.loads((folder / "8x.json").read_text())
    names = {name.removeprefix("model."): bits for name, bits in saved["weights"].items()}
    assert {**saved, "weights": names} == points["8x"]["allocation"]


def test_an_allocation_is_used_in_training(weights, tmp_path, capsys):
    folder = tmp_path / "allocations"
    given = ["--budgets", "8x", "--allocations", folder, "--bits", "2", "4", "8", "--granularity", "channel"]
    succeeds(capsys, "allocate", *MODEL, "--checkpoint", weights, *DATA, *given)
    module = TimmClassifier("test_resnet", num_classes=10, checkpoint=weights)
    callbacks = [Quantize(8, 8, calibration_samples=16), AllocateBits(allocation=folder / "8x.json", samples=16)]
    trainer(callbacks, max_epochs=0).fit(module, DigitsData(image_size=16, batch_size=16))
    found = lq.Allocation.load(folder / "8x.json")
    assert callbacks[1].allocated == found
    widths = {width for bits in found.weights.values() for width in (bits if isinstance(bits, tuple) else [bits])}
    assert widths <= {2, 4, 8} and len(widths) > 1
    assert any(isinstance(bits, tuple) for bits in found.weights.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["allocate", "resnt18", *DATA],
            "lq allocate: MODEL resnt18: Unknown model (resnt18); give the name of a timm",
        ),
        (["allocate", *MODEL, *DATA, "--budgets", "99x"], "lq allocate: --budgets 99x: "),
        (["allocate", *MODEL, *DATA, "--budgets", "much"], "lq allocate: "),
        (["allocate", *MODEL, *DATA, "--granularity", "row"], "lq allocate: --granularity: "),
        (["sensitivity", *MODEL], "lq sensitivity: "),
        (["sensitivity", *MODEL, "--data", "DigitData"], "lq sensitivity: --data DigitData: there is no such data mod"),
        (["sensitivity", *MODEL, *DATA, "--metric", "fishr"], "lq sensitivity: sensitivity='fishr' is unknown; use"),
        (["sensitivity", *MODEL, *DATA, "--samples", "0"], "lq sensitivity: --samples 0: expected 1 or more"),
        (
            ["sensitivity", "test_resnet", *DATA],
            "lq sensitivity: scikit-learn's digits has 10 classes, the model has 10",
        ),
        (["sensitivity", *MODEL, *DATA, "--checkpoint", "no.pth"], "lq sensitivity: there is no file no.pth"),
        (["sensitivity", *MODEL, *DATA, "--sample", "3", "--what"], "lq sensitivity: "),
    ],
)
def test_errors(arguments, message, capsys):
    said = complains(capsys, *arguments)
    assert said.startswith(message)


def test_a_quantized_checkpoint(tmp_path, capsys):
    module = TimmClassifier("test_resnet", num_classes=10)
    lq.calibrate(lq.attach(module.model, 4, None))
    torch.save(module.model.state_dict(), tmp_path / "q.pth")
    said = complains(capsys, "allocate", *MODEL, *DATA, "--checkpoint", tmp_path / "q.pth")
    assert said.endswith("q.pth is of a quantized model; give the weights of the float one")
