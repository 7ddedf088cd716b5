"""ONNX graphs made by hand, to be changed."""

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lq.export.graph import OPSET, Graph

F32, I8, U8 = np.float32, np.int8, np.uint8


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def model(parts, constants, *, x=("b", 4), outputs=("y",), opset=OPSET):
    """A model with the input x and those outputs, of float32."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        parts,
        "graph",
        [value("x", TensorProto.FLOAT, list(x))],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)  # outputs must say their rank


def optimized(proto, *, two_bits=False):
    """The graph and its model after all changes; the model is still one, and the changed one."""
    graph = Graph(proto)
    graph.optimize(least_stored=2 if two_bits else 4)
    graph.write()
    assert graph.model is proto
    onnx.checker.check_model(proto, full_check=True)
    return graph


def kinds(proto):
    return Counter(n.op_type for n in proto.graph.node)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def saved(proto, folder):
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def rounding(read, name, step="step", zero="zero", limit=None):
    """Quantize and dequantize, with a limit between."""
    parts = [node("QuantizeLinear", [read, step, zero], f"{name}_codes")]
    if limit:
        parts.append(node("Clip", [f"{name}_codes", "", limit], f"{name}_few"))
    return [*parts, node("DequantizeLinear", [parts[-1].output[0], step, zero], name)]


def product(codes, *, zero=None, step=0.5, axis=1, opset=OPSET):
    """x times a weight whose integers, steps and zero points are given."""
    codes = np.asarray(codes)
    steps = np.asarray(step, F32)
    zeros = np.zeros(steps.shape, codes.dtype) if zero is None else np.asarray(zero, codes.dtype)
    attributes = {"axis": axis} if steps.ndim else {}
    parts = [
        node("DequantizeLinear", ["fc.parametrizations.weight.original", "step", "zero"], "weight", **attributes),
        node("MatMul", ["x", "weight"], "y"),
    ]
    constants = {"fc.parametrizations.weight.original": codes, "step": steps, "zero": zeros}
    return model(parts, constants, x=("b", codes.shape[0]), opset=opset)


def layer(kind, bias, *, shared=False, quantized=True, step=(0.5, 0.25, 2.0), input_step=0.125):
    """A Gemm or a Conv of integers with a bias."""
    shape, axis, x = ((3, 4), 0, ("b", 4)) if kind == "Gemm" else ((3, 4, 1, 1), 0, ("b", 4, 2, 2))
    codes = np.random.default_rng(0).integers(-127, 128, shape).astype(I8)
    codes[:, 0] = 127
    constants = {
        "w": codes, "w_step": F32(step), "w_zero": np.zeros(np.shape(step), I8),
        "step": F32(input_step), "zero": U8(128), "bias": np.asarray(bias, F32),
    }  # fmt: skip
    parts = [
        *(rounding("x", "given") if quantized else [node("Identity", ["x"], "given")]),
        node("DequantizeLinear", ["w", "w_step", "w_zero"], "weight", **({"axis": axis} if np.ndim(step) else {})),
        node(kind, ["given", "weight", "bias"], "y", **({"transB": 1} if kind == "Gemm" else {})),
    ]
    if shared:
        parts.append(node("Identity", ["bias"], "z"))
    return model(parts, constants, x=x, outputs=("y", "z") if shared else ("y",))
