"""ExportModel: which part of a module is exported, and what it is called with."""

import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.callbacks import ExportModel, FineTune, Quantize
from lq.callbacks.export import network
from lq.errors import DataError, SpecError, StateError
from tests.callbacks.exporting import check, of, outputs, x
from tests.export.exported import assert_close, run
from tests.helpers import QUIET, Tiny, dataset, fit, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


# --- which part -------------------------------------------------------------------------------------------------------


class Pair(Tiny):
    """Two networks in a row."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x):
        return self.head(self.net(x))


class Scaled(Tiny):
    """A network, and a parameter beside it."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.net(x) * self.factor


def test_the_network_is_the_only_child_with_parameters():
    module = tiny()
    module.loss = nn.CrossEntropyLoss()
    assert network(module, None) is module.net
    assert network(module, "") is module
    assert network(module, "net.3") is module.net[3]
    for kind in (Pair, Scaled):
        module = of(kind)
        assert network(module, None) is module


@pytest.mark.parametrize("kind", [Pair, Scaled])
def test_a_module_of_more_than_a_network_is_exported_as_a_whole(kind, tmp_path):
    module, path = of(kind), tmp_path / "m.pt2"
    fit(module, [Quantize(4, 8), FineTune("lsq"), ExportModel(path)], max_epochs=1)
    with torch.no_grad():
        assert torch.equal(torch.export.load(path).module()(x()), module.eval()(x()))


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_parts_by_name(suffix, tmp_path):
    module = of(Pair)
    parts = {name: tmp_path / f"{name or 'all'}{suffix}" for name in ("", "net", "head", "net.3")}
    exports = [ExportModel(path, part=name) for name, path in parts.items()]
    fit(module, [Quantize(4, 8), *exports], max_epochs=0)
    given = {"": x(), "net": x(), "head": torch.randn(5, 3), "net.3": torch.randn(5, 4, 6, 6)}
    for name, path in parts.items():
        fresh = of(Pair, 5)
        part = fresh.get_submodule(name)
        if suffix == ".safetensors" and name == "net.3":
            continue  # a convolution that BatchNorms were folded into: no plain network of its own
        with torch.no_grad():
            expected = module.eval().get_submodule(name)(given[name])
        assert torch.equal(outputs(path, given[name], part), expected)


def test_a_part_of_another_name_is_an_error_before_training(tmp_path):
    module = tiny()
    with pytest.raises(SpecError, match=r"^ExportModel\(part='nets'\): Tiny has no such submodule$"):
        fit(module, [Quantize(4, 8), FineTune("lsq"), ExportModel(tmp_path / "m.onnx", part="nets")])
    assert not module.seen and not list(tmp_path.iterdir())


# --- what it is called with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["example", "example_input_array"])
def test_examples_are_used_instead_of_training_data(given, tmp_path):
    module, export = tiny(), ExportModel(tmp_path / "m.onnx", example=x()[:3] if given == "example" else None)
    if given == "example_input_array":
        module.example_input_array = x()[:3]
    fit(module, [Quantize(4, 8), export], max_epochs=0)
    assert export.report.samples == 3
    check(tmp_path / "m.onnx", module)


class Named(Tiny):
    """Batches are dicts; the network is called with names."""

    class Net(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, image, factor):
            return self.layers(image * factor)

    def __init__(self):
        super().__init__()
        self.net = self.Net(self.net)

    def calibration_step(self, batch):
        return self.net(image=batch["image"], factor=batch["factor"])

    def training_step(self, batch, batch_idx):
        return self.calibration_step(batch).square().mean()


def named_batches():
    images = dataset().tensors[0]
    return DataLoader([{"image": image, "factor": torch.full((1, 1, 1), 2.0)} for image in images], batch_size=8)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_batches_that_only_the_module_understands(suffix, tmp_path):
    module, path = of(Named), tmp_path / f"m{suffix}"
    export = ExportModel(path)
    fit(module, [Quantize(4, 8), FineTune("lsq"), export], named_batches(), max_epochs=1)
    image, factor = x()[:5], torch.full((5, 1, 1, 1), 3.0)
    with torch.no_grad():
        expected = module.net.eval()(image, factor)
        if suffix == ".onnx":
            assert export.report.samples == 32
            assert [value.name for value in onnx.load(path).graph.input] == ["image", "factor"]
            assert_close(run(path, image, factor)[0], expected, 1e-3)
        else:
            assert torch.equal(torch.export.load(path).module()(image=image, factor=factor), expected)


class Mixed(Named):
    """The network is called with a tensor and with a name."""

    def calibration_step(self, batch):
        return self.net(batch["image"], factor=batch["factor"])


class Outermost(Mixed):
    """And has a sum in its own forward."""

    class Net(Named.Net):
        def forward(self, image, factor):
            head = self.layers[:3](image * factor)
            return self.layers[6:](head + self.layers[3:6](head))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_arguments_by_place_and_by_name(suffix, tmp_path):
    module, path = of(Mixed), tmp_path / f"m{suffix}"
    fit(module, [Quantize(4, 8), ExportModel(path)], named_batches(), max_epochs=0)
    image, factor = x()[:5], torch.full((5, 1, 1, 1), 3.0)
    with torch.no_grad():
        expected = module.net.eval()(image, factor)
        if suffix == ".onnx":
            assert_close(run(path, image, factor)[0], expected, 1e-3)
        else:
            assert torch.equal(torch.export.load(path).module()(image, factor=factor), expected)


def test_arguments_by_place_and_by_name_of_the_outermost_forward(tmp_path):
    module, path = of(Outermost), tmp_path / "m.pt2"
    fit(module, [Quantize(4, 8, integer=True), ExportModel(path)], named_batches(), max_epochs=0)
    image, factor = x()[:5], torch.full((5, 1, 1, 1), 3.0)
    assert "call_quantizers" in module.net._modules
    with torch.no_grad():
        expected = module.net.eval()(image, factor)
        assert torch.equal(torch.export.load(path).module()(image, factor=factor), expected)


class Constant(Tiny):
    """The network is called with a tensor that is no part of the batch."""

    class Net(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, image, factor):
            return self.layers(image) * factor

    def __init__(self, factor):
        super().__init__()
        self.net, self.factor = self.Net(self.net), factor

    def forward(self, x):
        return self.net(x, self.factor)


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(torch.tensor(2.0), id="a number"),
        pytest.param(torch.tensor([2.0]), id="a vector of one"),
        pytest.param(torch.tensor([1.0, 2.0, 3.0]), id="a vector"),
    ],
)
def test_tensors_that_are_no_part_of_the_batch(factor, tmp_path):
    module, path = of(lambda: Constant(factor)), tmp_path / "m.pt2"
    fit(module, [Quantize(4, 8), ExportModel(path)], max_epochs=0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(path).module()(x(), factor), module.eval()(x()))


class Idle(Tiny):
    """A layer that nothing calls."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(4, 4)


def test_parts_that_no_batch_runs_through_need_an_example(tmp_path):
    message = "^ExportModel needs an example: give example=.* runs through the \\w*Linear$"
    with pytest.raises(DataError, match=message):
        fit(lq.attach(of(Idle), 4), [ExportModel(tmp_path / "m.onnx", part="idle")], max_epochs=0)
    assert not list(tmp_path.iterdir())
    export = ExportModel(tmp_path / "m.pt2", part="idle", example=torch.randn(2, 4))
    module = lq.attach(of(Idle), 4)
    fit(module, [export], max_epochs=0)
    given = torch.randn(5, 4)
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(given), module.idle.eval()(given))


def test_a_part_without_quantizers_is_an_error_before_training(tmp_path):
    module, quantize = of(Idle), Quantize(4, 8, exclude="idle")
    with pytest.raises(StateError, match="ExportModel"):
        fit(module, [quantize, FineTune("lsq"), ExportModel(tmp_path / "m.onnx", part="idle")])
    assert not module.seen
