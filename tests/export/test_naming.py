"""Free dimensions and names of inputs and outputs of ONNX files."""

import re

import onnx
import pytest
import torch
from torch import nn

import lq
from lq.errors import DataError, SpecError
from lq.export import export_onnx
from lq.export.naming import name_dimensions, rename
from tests.export.exported import calibrated, loaded, pictures, run, session

pytestmark = pytest.mark.filterwarnings("ignore:_check_is_size will be removed")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip


def quantized(model=None, x=None):
    x = pictures(8, 12) if x is None else x
    return calibrated(network() if model is None else model, x, weights=8, activations=8, integer=True)


def shapes(path):
    values = [*loaded(path).graph.input, *loaded(path).graph.output]
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def close(path, model, *inputs):
    with torch.no_grad():
        expected = model(*inputs)
    found = torch.tensor(run(path, *inputs)[0])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_free_height_and_width(tmp_path):
    model, path = quantized(), tmp_path / "m.onnx"
    free = ("batch", "height", "width")
    report = export_onnx(model, pictures(1, 12), path, check=[pictures(4, 12), pictures(3, 17)], dynamic=free)
    assert list(shapes(path).values()) == [["batch", 3, "height", "width"], ["batch", 3]]
    assert report.samples == 7 and report.largest_difference <= 0.02 * report.largest_output
    close(path, model, torch.randn(5, 3, 9, 30))


@pytest.mark.parametrize(
    ("free", "shape"), [((), [2, 3, 12, 12]), ("batch", ["batch", 3, 12, 12]), (["width"], [2, 3, 12, "width"])]
)
def test_what_is_free_has_a_name(free, shape, tmp_path):
    model, path = quantized(), tmp_path / "m.onnx"
    report = export_onnx(model, pictures(2, 12), path, check=[pictures(5, 12)], dynamic=free)
    assert next(iter(shapes(path).values())) == shape
    assert report.samples == (5 if "batch" in free else 4)  # in twos
    assert not any("batch size" in note for note in report.notes)


def test_sizes_of_outputs_follow(tmp_path):
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2, stride=2)), tmp_path / "m"
    model = quantized(model.eval())
    export_onnx(model, pictures(2, 12), path, check=False, dynamic=("batch", "height"), output_names=["map"])
    height = shapes(path)["map"][2]
    assert "height" in height and shapes(path)["map"] == ["batch", 2, height, 6]
    close(path, model, torch.randn(3, 3, 20, 12))


class Square(nn.Module):
    """Its head knows the size of the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3), nn.Linear(200, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


def test_a_network_of_one_size(tmp_path):
    model = quantized(Square().eval())
    message = (
        r"^torch\.export cannot export Square for images of any height and width: .*; give a larger example, on wh"
    )
    with pytest.raises(DataError, match=message):
        export_onnx(model, pictures(2, 12), tmp_path / "m.onnx", dynamic=("batch", "height", "width"))
    assert not list(tmp_path.iterdir())


def test_names_of_dimensions_that_there_are_not(tmp_path):
    model, path = quantized(), tmp_path / "m.onnx"
    for wrong in ("hight", ["hight"], ["batch", "channels"]):
        message = rf"^dynamic={re.escape(repr(wrong))}: expected one of batch, height, width, or a list of them$"
        with pytest.raises(SpecError, match=message):
            export_onnx(model, pictures(2, 12), path, dynamic=wrong)
    flat = calibrated(nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(8, 4), weights=8, activations=8)
    with pytest.raises(DataError, match=r"^dynamic=\['width'\]: no input has 4 dimensions, samples, channels, height"):
        export_onnx(flat, torch.randn(2, 4), path, dynamic=["width"])
    assert not list(tmp_path.iterdir())


class Two(nn.Module):
    """Two inputs and two outputs; one that torch calls like a name below."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left, right):
        relu = torch.relu(self.first(left))
        return relu + self.second(right), relu * 2


def test_names_of_inputs_and_outputs(tmp_path):
    torch.manual_seed(0)
    left, right, path = torch.randn(8, 4), torch.randn(8, 5), tmp_path / "m.onnx"
    model = lq.attach(Two().eval(), 8, 8)
    lq.calibrate(model, [{"left": left, "right": right}])
    names = {"input_names": ["linear", "b"], "output_names": ["relu", "double"]}
    report = export_onnx(model, {"left": left, "right": right}, path, **names)
    made = session(path)
    assert [value.name for value in made.get_inputs()] == ["linear", "b"]
    assert [value.name for value in made.get_outputs()] == ["relu", "double"]
    assert report.largest_difference <= 1e-4 * report.largest_output
    found = made.run(["double"], {"linear": left.numpy(), "b": right.numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(torch.tensor(found), model(left, right)[1], atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"inputs": ["a", "b"]}, "input_names=['a', 'b']: the file has 1 of them, x; give a list with a name for each"),
        ({"inputs": "image"}, "input_names='image': the file has 1 of them, x; give a list with a name for each"),
        ({"outputs": []}, "output_names=[]: the file has 1 of them, y; give a list with a name for each"),
        ({"inputs": ["y"]}, "'y' names two inputs or outputs, or none; give each a name of its own"),
        ({"inputs": [""]}, "'' names two inputs or outputs, or none; give each a name of its own"),
    ],
)
def test_names_that_cannot_be(names, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        rename(identity(), names.get("inputs"), names.get("outputs"))


def identity(dims=("s0", 3, "s1", "s0")):
    value = onnx.helper.make_tensor_value_info
    ends = [value("x", onnx.TensorProto.FLOAT, dims), value("y", onnx.TensorProto.FLOAT, [*dims[:2], "s1//2 + s11"])]
    nodes = [onnx.helper.make_node("Relu", ["x"], ["between"]), onnx.helper.make_node("Neg", ["between"], ["y"])]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]))


def test_a_name_that_is_taken_inside():
    model = identity()
    rename(model, ["between"], ["x"])
    assert [node.input[0] for node in model.graph.node] == ["between", "between_0"]
    assert [node.output[0] for node in model.graph.node] == ["between_0", "x"]
    onnx.checker.check_model(model)


def test_symbols_are_told_apart():
    model = identity()
    name_dimensions(model)
    found = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert found == ["batch", 3, "height", "batch"]
    assert model.graph.output[0].type.tensor_type.shape.dim[2].dim_param == "height//2 + s11"
