"""Files for onnxruntime and OpenVINO say there what the model says, computed in integers; those for TensorRT keep to
its rules, and say the same in onnxruntime.

An engine sums in another order, so that a value may fall on the other side of a rounding: one activation of some
10 000 moves by a step. Outputs are compared within two hundredths of the largest, and most of them closely.
"""

import re

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto
from torch import nn

import lq
from lq.errors import DataError, SpecError
from lq.export import export_onnx
from lq.export.engines import with_signed_codes
from lq.quantizer.targets import TARGETS
from tests.export.exported import calibrated, kinds, loaded, nodes, nudged, pictures, run, session, stored
from tests.models import Residual

pytestmark = [
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed"),
    pytest.mark.filterwarnings("ignore:.*SwigPy.*:DeprecationWarning"),
]


def slow(*values):
    """Parameters of a test that only the long run needs."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Net(nn.Module):
    """All kinds of products of a small CNN, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, 10)

    def forward(self, image):
        x = torch.relu(self.stem(image))
        x = x + torch.relu(self.each(torch.relu(self.conv(x))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


PRODUCTS = 5


def quantized(weights=8, *, target=None, first_last=None, **options):
    torch.manual_seed(0)
    return calibrated(
        Net().eval(), pictures(32), weights=weights, activations=8, integer=True, first_last=first_last, target=target,
        **options,
    )  # fmt: skip


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    return nudged(model).eval(), pictures(8, 32)


def resnet():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    lq.fold_batchnorm(model)
    return model, pictures(8, 32)


def agree(found, expected):
    with torch.no_grad():
        found, difference = torch.as_tensor(found), (torch.as_tensor(found) - expected).abs().amax(1)
    largest = expected.abs().max()
    assert difference.max() <= 0.02 * largest
    assert (difference <= 1e-4 * largest).float().mean() > 0.6


# --- onnxruntime ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, *map(slow, (1, 4, 6, 8))])
def test_onnxruntime(bits, tmp_path):
    model, x = quantized(bits, target="onnxruntime"), pictures(32)
    report = export_onnx(model, x[:2], tmp_path / "m.onnx", check=[x], target="onnxruntime")
    assert (report.products, report.integer_products) == (PRODUCTS, PRODUCTS)
    agree(run(tmp_path / "m.onnx", x)[0], model(x))


@pytest.mark.slow
def test_the_same_file_as_without_a_target(tmp_path):
    model, x = quantized(4), pictures()
    for name, target in (("a.onnx", None), ("b.onnx", "onnxruntime")):
        export_onnx(model, x, tmp_path / name, check=False, target=target)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [r for r in TARGETS["onnxruntime"].rules if not r.logarithmic], ids=lambda r: r.what[:20]
)
def test_what_onnxruntime_computes_in_float(rule, tmp_path):
    """The rules are what it does."""
    zero = {"symmetric": True, "signed": True} if rule.zeros == ("middle",) else {}
    bits = rule.widths[0] if len(rule.widths) == 1 else 8
    spec = lq.QuantSpec(bits, **{"per_channel": rule.of_weights, "symmetric": rule.of_weights, "signed": None, **zero})
    if rule.of_weights:
        spec = lq.QuantSpec(bits, signed=True)
    torch.manual_seed(0)
    options = {"weights": 8, "activations": 8, "weights" if rule.of_weights else "activations": spec}
    with pytest.warns(lq.NoEffectWarning, match=re.escape(f"have {rule.what}")):
        model = calibrated(Net().eval(), pictures(8), **options, integer=True, first_last=None, target="onnxruntime")
    report = export_onnx(model, pictures(2), tmp_path / "m.onnx", target="onnxruntime")
    assert report.integer_products < report.products == PRODUCTS


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


def in_openvino(path, x):
    """What OpenVINO computes, and the names of the kernels of its products."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    made = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [operation.get_rt_info() for operation in made.get_runtime_model().get_ops()]
    products = ("Convolution", "FullyConnected", "MatMul")
    kernels = [i["primitiveType"].astype(str) for i in infos if i["layerType"].astype(str) in products]
    return made(x.numpy())[0], kernels if "INT8" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else None


def of_integers(kernels):
    return sum(kernel.lower().endswith("i8") for kernel in kernels)


LATER = [(1, None), (3, None), (4, 25), (7, 13), (8, None), (8, 27)]


@pytest.mark.parametrize(("bits", "opset"), [(2, None), (5, 13), *(slow(*one) for one in LATER)])
@pytest.mark.filterwarnings("ignore:The model version conversion")
def test_openvino(bits, opset, tmp_path):
    model, x = quantized(bits, target="openvino"), pictures(32)
    report = export_onnx(model, x[:2], tmp_path / "m.onnx", target="openvino", opset=opset)
    assert report.opset == (opset or 21) and report.integer_products is None
    assert report.weights.keys() == {"int4" if bits <= 4 else "int8"}
    stored_in_more = "weights of fewer bits are stored in 4: openvino reads no smaller type"
    assert (stored_in_more in report.notes) == (bits <= 2)
    found, kernels = in_openvino(tmp_path / "m.onnx", x)
    agree(found, model(x))
    if kernels is not None:
        assert len(kernels) == of_integers(kernels) == PRODUCTS


@pytest.mark.slow
@pytest.mark.parametrize(("make", "products"), [(resnet, 16), (vit, 6)])
def test_networks_of_timm_in_openvino(make, products, tmp_path):
    model, x = make()
    with torch.no_grad():
        floats = model(x)
    model = calibrated(model, x, weights=8, activations=8, integer=True, target="openvino")
    export_onnx(model, x[:2], tmp_path / "m.onnx", target="openvino")
    found, kernels = in_openvino(tmp_path / "m.onnx", x)
    with torch.no_grad():
        expected = model(x)
    error = (torch.from_numpy(found) - expected).pow(2).mean()
    assert error < 0.5 * (expected - floats).pow(2).mean()  # less than quantization itself
    if kernels is not None:
        assert of_integers(kernels) == len(kernels) == products


@pytest.mark.parametrize(
    ("options", "all_in_integers"),
    [({"weights": 7, "symmetric": False}, True), ({"weights": 8, "symmetric": False}, False), ({"weights": 16}, False)],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:target='openvino' computes a part")
def test_what_openvino_computes_in_float(options, all_in_integers, tmp_path):
    model, x = quantized(**options, target="openvino"), pictures(8)
    export_onnx(model, x[:2], tmp_path / "m.onnx", target="openvino")
    found, kernels = in_openvino(tmp_path / "m.onnx", x)
    agree(found, model(x))
    if kernels is not None:
        assert (of_integers(kernels) == PRODUCTS) == all_in_integers


# --- TensorRT, by its rules -------------------------------------------------------------------------------------------


def require_rules(path):
    """What its documents ask of a file, read from the file."""
    names = stored(path)
    quantizers = [*nodes(path, "QuantizeLinear"), *nodes(path, "DequantizeLinear")]
    assert quantizers
    for node in quantizers:
        zero = names[node.input[2]]
        assert zero.data_type == TensorProto.INT8 and not any(zero.raw_data)
    steps = {node.input[1] for node in nodes(path, "QuantizeLinear")}
    assert all(not names[name].dims for name in steps)  # activations: one step
    read_by = {}
    for node in nodes(path):
        for name in node.input:
            read_by.setdefault(name, set()).add(node.op_type)
    codes = [node.output[0] for node in nodes(path, "QuantizeLinear")]
    codes += [name for name, tensor in names.items() if tensor.data_type == TensorProto.INT8]
    assert all(read_by[name] <= {"DequantizeLinear", "QuantizeLinear"} for name in codes)
    small = {TensorProto.INT4, TensorProto.INT2, TensorProto.UINT8, TensorProto.UINT4, TensorProto.UINT2}
    assert not small & {tensor.data_type for tensor in names.values()}
    assert not {"Cast", "Clip"} & kinds(path).keys()
    assert 13 <= loaded(path).opset_import[0].version <= 20


@pytest.mark.parametrize("bits", [(0, 1, 2, 3, 4, 5, 6, 8), *map(slow, (1, 2, 4, 6, 8))])
def test_tensorrt(bits, tmp_path):
    target = "tensorrt"
    model, x = quantized(8 if isinstance(bits, tuple) else bits, target=target), pictures(32)
    if isinstance(bits, tuple):
        lq.set_bits(model, {"conv": bits})
    report = export_onnx(model, x[:2], tmp_path / "m.onnx", target=target)
    require_rules(tmp_path / "m.onnx")
    assert report.opset == 20 and report.weights.keys() == {"int8"} and report.products is None
    assert report.notes[0] == "written for tensorrt by its documents: no tensorrt has run files of lq yet"
    assert "in integers there" not in str(report)
    agree(run(tmp_path / "m.onnx", x, plain=True)[0], model(x))


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet, vit, lambda: (Residual().eval(), pictures(8))], ids=["resnet", "vit", "sum"])
def test_networks_for_tensorrt(make, tmp_path):
    model, x = make()
    model = calibrated(model, x, weights=8, activations=8, integer=True, target="tensorrt")
    report = export_onnx(model, x[:2], tmp_path / "m.onnx", check=[x], target="tensorrt", opset=17)
    require_rules(tmp_path / "m.onnx")
    assert report.opset == 17 and report.largest_difference <= 0.05 * report.largest_output


def test_what_tensorrt_does_not_run(tmp_path):
    path = tmp_path / "m.onnx"
    message = r"^target='tensorrt' does not run this network: \d+ activations have their zero elsewhere than in the mid"
    with pytest.raises(SpecError, match=message):
        export_onnx(quantized(), pictures(2), path, target="tensorrt")
    with pytest.raises(DataError, match=r"^opset=26: target='tensorrt' reads 13 to 25$"):
        export_onnx(quantized(target="tensorrt"), pictures(2), path, target="tensorrt", opset=26)
    with pytest.raises(SpecError, match=r"^target='tensor' is unknown"):
        export_onnx(quantized(), pictures(2), path, target="tensor")
    assert not list(tmp_path.iterdir())


class Computed(nn.Module):
    """Its weight is computed before it is multiplied."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.tanh())


def test_integers_that_are_limited_are_none_of_tensorrts(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Computed(), nn.ReLU(), nn.Linear(4, 3)).eval()
    options = {"weights": 4, "activations": 8, "integer": True, "target": "tensorrt"}
    model = calibrated(model, torch.randn(8, 8), **options)
    with pytest.raises(
        DataError, match=r"^target='tensorrt' has no Clip of integers .* leave the layer .* by exclude="
    ):
        export_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx", target="tensorrt")
    assert not list(tmp_path.iterdir())


def test_codes_of_another_form_are_named():
    codes = onnx.helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["y"], "of_x")
    values = onnx.numpy_helper.from_array(np.array(3, np.uint8), "zero")
    graph = onnx.helper.make_graph([codes], "g", [], [], [values])
    with pytest.raises(
        DataError, match=r"takes INT8 with zero point 0 only, of_x is of another form; quantize with the"
    ):
        with_signed_codes(onnx.helper.make_model(graph), TARGETS["tensorrt"])


@pytest.mark.slow
def test_activations_keep_their_values(tmp_path):
    """INT8 with zero point 0 and UINT8 with zero point 128 are the same levels: bit for bit without optimization."""
    model, x = quantized(target="tensorrt"), pictures(16)
    export_onnx(model, x[:2], tmp_path / "signed.onnx", check=False, target="tensorrt")
    export_onnx(model, x[:2], tmp_path / "plain.onnx", check=False, opset=20)
    found, expected = (run(tmp_path / f"{name}.onnx", x, plain=True)[0] for name in ("signed", "plain"))
    assert np.array_equal(found, expected)
    kinds_of_input = [value.type for value in session(tmp_path / "signed.onnx").get_inputs()]
    assert kinds_of_input == ["tensor(float)"]
