"""Quantized models to export, and exported ONNX files taken apart without lq's code."""

import functools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import lq

TYPES = {
    TensorProto.INT2: (2, True), TensorProto.UINT2: (2, False), TensorProto.INT4: (4, True),
    TensorProto.UINT4: (4, False), TensorProto.INT8: (8, True), TensorProto.UINT8: (8, False),
}  # fmt: skip


class Pairs(nn.Module):
    """Its code says that a batch has two samples."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.view(2, -1))


def weights(bits, **options):
    """Quick to find the ranges of."""
    return lq.QuantSpec(bits, **{"range": "minmax", "signed": True, **options})


def activations(bits):
    return lq.QuantSpec(bits, per_channel=False, symmetric=False, range="minmax")


def calibrated(model, x, *, structure=True, **options):
    """Attached by its structure (or by classes), with ranges, in eval mode."""
    found = lq.inspect(model, x) if structure else None
    return lq.calibrate(lq.attach(model, structure=found, **options), [x]).eval()


def nudged(model, seed=0):
    """Biases far from zero: exporters drop those that are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def depthwise(seed=0):
    """Convolutions by channel and by pixel, pooled, with a head."""
    torch.manual_seed(seed)
    return nudged(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )
    ).eval()  # fmt: skip


def pictures(samples=4, size=8, seed=1, channels=3):
    return torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(seed))


# --- files --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _loaded(path, changed, size):
    return onnx.load(path)


def loaded(path):
    """The model in a file, read once; not to be changed."""
    found = Path(path).stat()
    return _loaded(Path(path), found.st_mtime_ns, found.st_size)


def nodes(path, kind=None):
    return [node for node in loaded(path).graph.node if kind in (None, node.op_type)]


def limits_of_codes(path):
    """Clip nodes of what QuantizeLinear gives: the limits of activations of fewer bits than their type."""
    codes = {node.output[0] for node in nodes(path, "QuantizeLinear")}
    return [node for node in nodes(path, "Clip") if node.input[0] in codes]


def kinds(path):
    return Counter(node.op_type for node in nodes(path))


def stored(path):
    """Initializers by name."""
    return {tensor.name: tensor for tensor in loaded(path).graph.initializer}


def constants(path):
    return {name: numpy_helper.to_array(tensor) for name, tensor in stored(path).items()}


def types(path):
    """Names of the types of stored weights, by name."""
    named = {name: TensorProto.DataType.Name(t.data_type) for name, t in stored(path).items()}
    return {
        name: kind for name, kind in named.items() if re.search(r"(\.weight|\.original|_weight(_\d+|_[ih]h)?)$", name)
    }


def unpacked(tensor):
    """The integers of an initializer of few bits, from its bytes; the first of those in a byte are its low bits."""
    width, signed = TYPES[tensor.data_type]
    each, count = 8 // width, math.prod(tensor.dims)
    assert len(tensor.raw_data) == math.ceil(count / each)
    places = width * np.arange(each)
    codes = (np.frombuffer(tensor.raw_data, np.uint8).astype(int)[:, None] >> places & (2**width - 1)).flatten()[:count]
    if signed:
        codes = np.where(codes >= 2 ** (width - 1), codes - 2**width, codes)
    return codes.reshape(tensor.dims)


def known(path):
    """Tensors that follow from initializers alone, by name, through the operators that weights pass; float64."""
    raw = stored(path).items()
    found = {name: unpacked(t) if t.data_type in TYPES else numpy_helper.to_array(t) for name, t in raw}
    for node in nodes(path):
        if not node.input or any(name not in found for name in node.input):
            continue
        parts = [found[name] for name in node.input]
        made = node.output[0]
        if node.op_type == "Cast":
            found[made] = parts[0]
        elif node.op_type == "Sub":
            found[made] = parts[0] - parts[1]
        elif node.op_type == "Mul":
            found[made] = parts[0] * parts[1]
        elif node.op_type == "DequantizeLinear":
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if i == axis else 1 for i in range(parts[0].ndim)] if parts[1].ndim else []
            step, *zeros = (part.astype(np.float64).reshape(shape) for part in parts[1:])
            found[made] = (parts[0].astype(np.float64) - (zeros[0] if zeros else 0.0)) * step
    return found


def multiplied(path, layer):
    """What the nodes that use a layer's weight multiply by, in torch's order of dimensions, and those nodes."""
    found, readers = known(path), {}
    for node in nodes(path):
        for name in node.input:
            readers.setdefault(name, []).append(node)
    waiting, values = [stored_name(path, layer)], []
    while waiting:
        name = waiting.pop()
        for node in readers[name]:
            if node.op_type in ("Cast", "Sub", "Mul", "DequantizeLinear"):
                waiting.append(node.output[0])
                continue
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            value = found[name]
            values.append((value.T if node.op_type in ("MatMul", "Gemm") and not turned else value, node))
    return values


def stored_name(path, layer):
    """The name of the integers of a layer's weight, None if it has none: those that no int8 holds keep torch's."""
    names = stored(path)
    parent, _, operand = layer.rpartition(".")
    of_call = f"{parent}.call_quantizers.{operand}.levels".lstrip(".")
    wanted = (f"{layer}.weight", f"{layer}.parametrizations.weight.original", layer, of_call)
    return next((name for name in wanted if name in names), None)


def steps_of(path, kind):
    """Nodes of a kind on two operands of integers, and the products of their steps."""
    made = {node.output[0]: node for node in nodes(path)}
    values = constants(path)
    for node in nodes(path, kind):
        parts = [made.get(name) for name in node.input[:2]]
        if all(part is not None and part.op_type == "DequantizeLinear" for part in parts):
            yield node, values[parts[0].input[1]] * values[parts[1].input[1]]


def biases(path):
    """Biases of layers on integers by the name of the constant: their values, and the products of steps."""
    values, made = known(path), {node.output[0]: node for node in nodes(path)}
    for kind in ("Conv", "ConvTranspose", "Gemm"):
        for node, product in steps_of(path, kind):
            if len(node.input) < 3:
                continue
            source = made.get(node.input[2])
            name = node.input[2] if source is None else source.input[0].removesuffix("_integer")
            yield name, values[node.input[2]], product, node


def session(path, *, optimized=None, plain=False):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(path, *inputs, plain=False):
    """Outputs of a file (or of a model) in onnxruntime."""
    made = session(path, plain=plain)
    feed = {value.name: np.asarray(x) for value, x in zip(made.get_inputs(), inputs, strict=True)}
    return made.run(None, feed)


def dynamic(path):
    """Whether the first dimension of all inputs is free."""
    return all(value.type.tensor_type.shape.dim[0].dim_param for value in loaded(path).graph.input)


def relative(report):
    return report.largest_difference / report.largest_output


def assert_close(left, right, tolerance=1e-6):
    """Alike up to the order of float sums."""
    left, right = (t.detach().double() if isinstance(t, Tensor) else torch.tensor(t).double() for t in (left, right))
    assert left.shape == right.shape
    assert (left - right).abs().max() <= tolerance * right.abs().max()
