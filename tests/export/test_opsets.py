"""ONNX files of older opsets: checked by onnx against that opset, computed by onnxruntime, equal to the model."""

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lq
from lq.errors import DataError
from lq.export import export_onnx
from lq.export.opsets import lowered

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# The first IR version whose readers must know an opset, from ONNX's table of versions.
IR = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}


def run(model, **inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Hardswish(), nn.Flatten(),
        nn.Linear(4 * 64, 5),
    ).eval()  # fmt: skip


class Norms(nn.Module):
    """What opset 17 and 18 write otherwise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.bare = nn.LayerNorm((6, 8)), nn.LayerNorm(8, elementwise_affine=False)
        self.linear, self.mish = nn.Linear(8, 8), nn.Mish()

    def forward(self, x):
        x = self.mish(self.linear(self.norm(x)))
        first, second = self.bare(x).chunk(2, dim=1)
        return (first - second).mean(dim=(1, 2)) + x.amax(dim=(1, 2)).reshape(-1)


MODELS = {
    "8 bits": (convnet, (3, 12, 12), 8, 8, {}),
    "8 bits in integers": (convnet, (3, 12, 12), 8, 8, {"integer": True}),
    "zero points": (convnet, (3, 12, 12), 8, 8, {"symmetric": False}),
    "6 bits": (convnet, (3, 12, 12), 6, 5, {}),
    "activations of 4 bits": (convnet, (3, 12, 12), 8, 4, {}),
    "activations of 16 bits": (convnet, (3, 12, 12), 8, 16, {}),
    "16 bits": (convnet, (3, 12, 12), 16, 16, {}),
    "weights alone": (convnet, (3, 12, 12), 8, None, {}),
    "norms": (Norms, (6, 8), 8, 8, {}),
}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("kind", MODELS)
def test_older_opsets(kind, opset, tmp_path):
    make, shape, weights, activations, options = MODELS[kind]
    model, x = make(), torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    lq.attach(model, weights, activations, structure=lq.inspect(model, x), **options)
    lq.calibrate(model, [x]).eval()
    report = export_onnx(model, x[:2], tmp_path / "m.onnx", check=[x], opset=opset)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", opset)]
    assert report.opset == opset and proto.ir_version == IR[opset]
    (found,) = run(proto, **{proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    step = max((float(q.step) for q in lq.attachment.sites.activation_quantizers(model).values()), default=0.0)
    assert float((torch.from_numpy(found) - expected).abs().max()) < max(1e-5, 2 * step if kind == "norms" else 0)
    if opset > 13:
        return
    latest = export_onnx(model, x[:2], tmp_path / "latest.onnx", check=[x])
    assert report.integer_products == latest.integer_products and report.weights == latest.weights


def test_the_default_stays(tmp_path):
    model, x = convnet(), torch.randn(2, 3, 12, 12)
    lq.calibrate(lq.attach(model, 8, 8), [x])
    assert export_onnx(model, x, tmp_path / "m.onnx").opset == 21


def test_a_timm_model_with_batches_of_any_size(tmp_path):
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", num_classes=5, img_size=32).eval(), torch.randn(3, 3, 32, 32)
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x]).eval()
    export_onnx(model, x, tmp_path / "m.onnx", opset=13)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    for samples in (1, 3):
        (found,) = run(proto, **{proto.graph.input[0].name: x[:samples].numpy()})
        with torch.no_grad():
            assert np.array_equal(found.argmax(1), model(x[:samples]).argmax(1).numpy())


# --- operators alone: the same values before and after, by onnxruntime ------------------------------------------------


def of_one(operator, inputs, constants=(), outputs=1, **attributes):
    """A model of one operator in opset 18."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    kind = TensorProto.INT64 if operator == "Shape" else TensorProto.FLOAT
    results = [helper.make_tensor_value_info(f"y{i}", kind, None) for i in range(outputs)]
    names = [*inputs, *(name for name, _ in constants)]
    node = helper.make_node(operator, names, [f"y{i}" for i in range(outputs)], "it", **attributes)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants]
    graph = helper.make_graph([node], "g", values, results, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made)


X = {"x": [2, 4, 6]}
OPERATORS = {
    "ReduceMean of axes": lambda: of_one("ReduceMean", X, [("axes", np.array([1, -1]))], keepdims=0),
    "ReduceMax of all": lambda: of_one("ReduceMax", X),
    "ReduceMin of nothing": lambda: of_one("ReduceMin", X, noop_with_empty_axes=1),
    "ReduceL2": lambda: of_one("ReduceL2", X, [("axes", np.array([0]))]),
    "Split": lambda: of_one("Split", X, outputs=2, axis=2, num_outputs=2),
    "Split in sizes": lambda: of_one("Split", X, [("sizes", np.array([1, 3]))], outputs=2, axis=1),
    "Reshape": lambda: of_one("Reshape", X, [("shape", np.array([0, -1]))], allowzero=0),
    "Reshape without zeros": lambda: of_one("Reshape", X, [("shape", np.array([8, -1]))], allowzero=1),
    "Shape": lambda: of_one("Shape", X),
    "Shape from": lambda: of_one("Shape", X, start=1),
    "Shape to": lambda: of_one("Shape", X, start=-3, end=-1),
    "HardSwish": lambda: of_one("HardSwish", X),
    "Mish": lambda: of_one("Mish", X),
    "LayerNormalization": lambda: of_one(
        "LayerNormalization", X, [("s", np.linspace(1, 2, 6, dtype="f4")), ("b", np.ones(6, "f4"))], epsilon=0.1
    ),
    "LayerNormalization of two": lambda: of_one(
        "LayerNormalization", X, [("s", np.linspace(1, 2, 24, dtype="f4").reshape(4, 6))], axis=1
    ),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_in_opset_13(kind):
    before, after = OPERATORS[kind](), OPERATORS[kind]()
    lowered(after, 13)
    onnx.checker.check_model(after, full_check=True)
    assert after.opset_import[0].version == 13 and after.ir_version == 7
    x = np.random.default_rng(0).normal(0, 3, (2, 4, 6)).astype("f4")
    # onnxruntime 1.23 cannot run a reduction of nothing in opset 18
    expected = [x] if kind == "ReduceMin of nothing" else run(before, x=x)
    for one, other in zip(expected, run(after, x=x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


TOO_NEW = {
    "Trilu": (lambda: of_one("Trilu", X), r"Trilu \(it\), which is there from opset 14 on"),
    "Pad with axes": (
        lambda: of_one("Pad", X, [("p", np.array([1, 1])), ("v", np.float32(0)), ("a", np.array([1]))]),
        r"Pad \(it\), which takes 4 inputs from opset 18 on only",
    ),
    "a sum that scatters": (
        lambda: of_one(
            "ScatterElements", X, [("i", np.zeros((2, 4, 6), np.int64)), ("u", np.ones((2, 4, 6), "f4"))],
            reduction="add",
        ),
        r"ScatterElements \(it\), whose reduction is there from opset 18 on",
    ),
    "Reshape to nothing": (
        lambda: of_one("Reshape", X, [("shape", np.array([0, -1]))], allowzero=1),
        r"Reshape \(it\), whose allowzero is there from opset 14 on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOO_NEW)
def test_what_an_old_opset_cannot_say(kind):
    make, message = TOO_NEW[kind]
    with pytest.raises(DataError, match=f"^opset=13 is too old for {message}; choose a later one$"):
        lowered(make(), 13)
