"""Changes of ONNX graphs, on graphs made by hand: the function stays, in the numbers of onnxruntime."""

import itertools
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lq.export.graph import OPSET, OPSET_OF_INT2, Graph, _factors
from tests.export.exported import known, nodes, run, stored, unpacked

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


# --- quantizers of one tensor -----------------------------------------------------------------------------------------

GRID = {"step": F32(0.25), "zero": U8(7), "step_again": F32(0.25), "zero_again": U8(7)}


@pytest.mark.parametrize("limit", [None, "most"])
def test_quantizers_that_are_alike_become_one(limit):
    parts = [
        *rounding("x", "left", limit=limit),
        *rounding("x", "right", "step_again", "zero_again", limit and "most_again"),
        node("Mul", ["left", "right"], "y"),
    ]
    proto = model(parts, {**GRID, "most": U8(15), "most_again": U8(15)})
    x = random(5, 4) * 3
    before = run(proto, x)[0]
    optimized(proto)
    assert kinds(proto) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Mul": 1, **({"Clip": 1} if limit else {})}
    assert set(proto.graph.node[-1].input) == {"left"}
    assert np.array_equal(run(proto, x)[0], before)


@pytest.mark.parametrize(
    "other",
    [
        {"step_again": F32(0.5)},
        {"zero_again": U8(8)},
        {"zero_again": I8(7)},
        {"most_again": U8(14)},
    ],
)
def test_quantizers_that_differ_stay_apart(other):
    constants = {**GRID, "most": U8(15), "most_again": U8(15), **other}
    if constants["zero_again"].dtype == I8:  # the same bytes, of another type
        constants["most_again"] = I8(15)
    parts = [
        *rounding("x", "left", limit="most"),
        *rounding("x", "right", "step_again", "zero_again", "most_again"),
        node("Sub", ["left", "right"], "y"),
    ]
    proto = model(parts, constants)
    x = random(50, 4) * 3
    before = run(proto, x)[0]
    assert before.any()
    optimized(proto)
    assert kinds(proto)["DequantizeLinear"] == 2
    assert np.array_equal(run(proto, x)[0], before)


def test_quantizers_of_other_tensors_stay_apart():
    parts = [
        node("Neg", ["x"], "minus"),
        *rounding("x", "left"),
        *rounding("minus", "right"),
        node("Sub", ["left", "right"], "y"),
    ]
    proto = model(parts, GRID)
    before = run(proto, random(5, 4))[0]
    optimized(proto)
    assert kinds(proto)["QuantizeLinear"] == 2
    assert np.array_equal(run(proto, random(5, 4))[0], before)


def test_steps_by_channel_are_the_same_if_they_are_one_constant():
    def made(again):
        parts = [
            node("QuantizeLinear", ["x", "step", "zero"], "codes", axis=1),
            node("DequantizeLinear", ["codes", "step", "zero"], "left", axis=1),
            node("QuantizeLinear", ["x", again, "zero"], "codes_again", axis=1),
            node("DequantizeLinear", ["codes_again", again, "zero"], "right", axis=1),
            node("Sub", ["left", "right"], "y"),
        ]
        constants = {"step": F32([1, 2, 3, 4]), "other": F32([1, 2, 3, 5]), "zero": np.zeros(4, I8)}
        return model(parts, constants)

    same, other = made("step"), made("other")
    optimized(same), optimized(other)
    assert (kinds(same)["QuantizeLinear"], kinds(other)["QuantizeLinear"]) == (1, 2)
    assert not run(same, random(9, 4) * 9)[0].any() and run(other, random(9, 4) * 9)[0].any()


def test_axes_tell_quantizers_apart():
    parts = [
        node("QuantizeLinear", ["x", "step", "zero"], "codes", axis=0),
        node("DequantizeLinear", ["codes", "step", "zero"], "left", axis=0),
        node("QuantizeLinear", ["x", "step", "zero"], "codes_again", axis=1),
        node("DequantizeLinear", ["codes_again", "step", "zero"], "right", axis=1),
        node("Sub", ["left", "right"], "y"),
    ]
    proto = model(parts, {"step": F32([1, 2, 3, 4]), "zero": np.zeros(4, I8)}, x=(4, 4))
    before = run(proto, random(4, 4) * 9)[0]
    optimized(proto)
    assert kinds(proto)["QuantizeLinear"] == 2
    assert np.array_equal(run(proto, random(4, 4) * 9)[0], before) and before.any()


def test_outputs_of_the_model_keep_their_names():
    parts = [*rounding("x", "y"), *rounding("x", "z", "step_again", "zero_again")]
    proto = model(parts, GRID, outputs=("y", "z"))
    x = random(5, 4)
    before = run(proto, x)
    optimized(proto)
    assert [value.name for value in proto.graph.output] == ["y", "z"]
    assert all(np.array_equal(*pair) for pair in zip(run(proto, x), before, strict=True))


# --- transposed weights -----------------------------------------------------------------------------------------------


def transposed(order, axis, shape=(2, 3, 4), *, extra=(), outputs=("y",), perm=True):
    """A weight that is dequantized, transposed and added to."""
    rng = np.random.default_rng(1)
    size = () if axis is None else (shape[axis],)
    constants = {
        "w": rng.integers(-8, 8, shape).astype(I8),
        "step": rng.random(size).astype(F32) + F32(0.5),
        "zero": np.zeros(size, I8),
        "many": F32([0.0]),
    }
    attributes = {} if axis is None else {"axis": axis}
    parts = [
        node("DequantizeLinear", ["w", "step", "zero"], "weight", **attributes),
        node("Transpose", ["weight"], "turned", **({"perm": list(order)} if perm else {})),
        node("ReduceMean", ["x"], "one", keepdims=0),
        node("Add", ["one", "turned"], "y"),
        *extra,
    ]
    return model(parts, constants, outputs=outputs)


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -3])
def test_every_order_of_dimensions_is_folded(axis):
    for order in itertools.permutations(range(3)):
        proto = transposed(order, axis)
        before = run(proto, random(2, 4))[0]
        optimized(proto)
        assert kinds(proto)["Transpose"] == 0
        weight = next(t for t in proto.graph.initializer if t.name == "w")
        assert list(weight.dims) == [(2, 3, 4)[i] for i in order]
        assert np.array_equal(run(proto, random(2, 4))[0], before)


def test_a_transpose_without_an_order_reverses():
    proto = transposed(None, 0, perm=False)
    before = run(proto, random(2, 4), plain=True)[0]  # onnxruntime 1.23 crashes when it optimizes this
    optimized(proto)
    assert kinds(proto)["Transpose"] == 0
    assert np.array_equal(run(proto, random(2, 4))[0], before)


@pytest.mark.parametrize(
    ("extra", "outputs"),
    [
        ([node("Identity", ["weight"], "z")], ("y", "z")),
        ([node("DequantizeLinear", ["w", "step", "zero"], "z", axis=0)], ("y", "z")),
        ([], ("y", "weight")),
    ],
    ids=["read twice", "dequantized twice", "an output"],
)
def test_a_weight_that_others_read_stays_as_it_is(extra, outputs):
    proto = transposed((2, 0, 1), 0, extra=extra, outputs=outputs)
    before = run(proto, random(2, 4))
    optimized(proto)
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    assert list(weight.dims) == [2, 3, 4]
    assert all(np.array_equal(*pair) for pair in zip(run(proto, random(2, 4)), before, strict=True))


# --- the types of weights ---------------------------------------------------------------------------------------------


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


LIMITS = [
    (I8, (-1, 1), "int2", "int4"),
    (I8, (-2, 1), "int2", "int4"),
    (I8, (0, 0), "int2", "int4"),
    (I8, (-2, 2), "int4", "int4"),
    (I8, (-3, 1), "int4", "int4"),
    (I8, (-8, 7), "int4", "int4"),
    (I8, (-8, 8), "int8", "int8"),
    (I8, (-9, 7), "int8", "int8"),
    (I8, (-128, 127), "int8", "int8"),
    (U8, (0, 3), "uint2", "uint4"),
    (U8, (0, 4), "uint4", "uint4"),
    (U8, (0, 15), "uint4", "uint4"),
    (U8, (0, 16), "uint8", "uint8"),
]


@pytest.mark.parametrize("two_bits", [True, False])
@pytest.mark.parametrize(("dtype", "limits", "small", "larger"), LIMITS)
def test_weights_take_the_smallest_type(dtype, limits, small, larger, two_bits, tmp_path):
    low, high = limits
    codes = np.random.default_rng(0).integers(low, high + 1, (4, 3)).astype(dtype)
    codes[0, 0], codes[1, 1] = low, high
    proto = product(codes, step=[0.5, 0.25, 3.0], zero=None if dtype == I8 else [1, 2, 3])
    x = random(5, 4)
    before = run(proto, x, plain=True)[0]
    proto.opset_import[0].version = OPSET_OF_INT2 if two_bits else OPSET
    graph = optimized(proto, two_bits=two_bits)
    wanted = small if two_bits else larger
    assert graph.stored == {wanted: 12}
    path = saved(proto, tmp_path)
    tensor = stored(path)["fc.weight"]
    assert TensorProto.DataType.Name(tensor.data_type) == wanted.upper()
    assert np.array_equal(unpacked(tensor), codes)
    assert len(tensor.raw_data) == -(-12 * int(wanted.strip("uint")) // 8)
    np.testing.assert_allclose(run(path, x, plain=True)[0], before, rtol=1e-6, atol=1e-6)
    read = nodes(path, "DequantizeLinear")[0]
    assert read.input[0] == "fc.weight_int8" or wanted == "int8"
    assert not known(path)[read.input[2]].any()


def test_levels_of_8_bits_are_read_as_they_are(tmp_path):
    codes = np.array([[-128, 100], [3, 127]], I8)
    proto = product(codes, step=[0.5, 0.25])
    optimized(proto)
    assert kinds(proto) == {"DequantizeLinear": 1, "MatMul": 1}
    assert unpacked(stored(saved(proto, tmp_path))["fc.weight"]).tolist() == codes.tolist()


def test_codes_of_8_bits_whose_levels_no_int8_holds_stay():
    codes = np.array([[0, 255], [200, 3]], U8)
    proto = product(codes, step=[0.5, 0.25], zero=[0, 128])
    before = run(proto, random(3, 2), plain=True)[0]
    graph = optimized(proto)
    assert graph.stored == {"uint8": 4}
    assert kinds(proto) == {"DequantizeLinear": 1, "MatMul": 1}
    assert np.array_equal(run(proto, random(3, 2), plain=True)[0], before)


def test_16_bits_stay():
    proto = product(np.array([[-30000, 5], [7, 32767]], np.int16), step=[0.5, 0.25])
    before = run(proto, random(3, 2), plain=True)[0]
    assert optimized(proto, two_bits=True).stored == {"int16": 4}
    assert np.array_equal(run(proto, random(3, 2), plain=True)[0], before)


def test_a_step_for_the_whole_weight(tmp_path):
    proto = product(np.array([[-3, 5], [7, -8]], I8), step=0.3)
    before = run(proto, random(3, 2), plain=True)[0]
    optimized(proto)
    found = known(saved(proto, tmp_path))
    assert found["fc.weight_int8"].tolist() == [[-24, 40], [56, -64]]
    assert found["weight"] == pytest.approx(np.array([[-0.9, 1.5], [2.1, -2.4]]), rel=1e-6)
    np.testing.assert_allclose(run(proto, random(3, 2), plain=True)[0], before, rtol=1e-6)


def test_two_products_of_one_weight_share_what_is_stored():
    parts = [
        node("DequantizeLinear", ["w", "step", "zero"], "left", axis=1),
        node("DequantizeLinear", ["w", "step", "zero"], "right", axis=0),
        node("MatMul", ["x", "left"], "product"),
        node("MatMul", ["product", "right"], "y"),
    ]
    codes = np.random.default_rng(0).integers(-8, 8, (4, 4)).astype(I8)
    proto = model(parts, {"w": codes, "step": F32([1, 1, 1, 1]), "zero": np.zeros(4, I8)})
    before = run(proto, random(3, 4), plain=True)[0]
    graph = optimized(proto)
    assert graph.stored == {"int4": 16}
    np.testing.assert_allclose(run(proto, random(3, 4), plain=True)[0], before, rtol=1e-5)


@pytest.mark.parametrize("dtype", [I8, U8])
def test_integers_that_are_shared_by_weights_of_other_steps(dtype):
    """As torch.onnx does it with equal integers of up to 1024 bytes."""
    parts = [
        node("DequantizeLinear", ["w", "step", "zero"], "left", axis=1),
        node("DequantizeLinear", ["w", "other_step", "zero"], "right", axis=1),
        node("MatMul", ["x", "left"], "product"),
        node("MatMul", ["product", "right"], "y"),
    ]
    codes = np.random.default_rng(0).integers(0, 8, (4, 4)).astype(dtype)
    constants = {"w": codes, "step": F32([1, 2, 3, 4]), "other_step": F32([5, 6, 7, 8]), "zero": np.zeros(4, dtype)}
    proto = model(parts, constants)
    before = run(proto, random(3, 4), plain=True)[0]
    optimized(proto)
    np.testing.assert_allclose(run(proto, random(3, 4), plain=True)[0], before, rtol=1e-5)


def test_integers_that_are_shared_by_weights_of_other_zero_points():
    parts = [
        node("DequantizeLinear", ["w", "step", "zero"], "left"),
        node("DequantizeLinear", ["w", "step", "other_zero"], "right"),
        node("MatMul", ["x", "left"], "product"),
        node("MatMul", ["product", "right"], "y"),
    ]
    codes = np.random.default_rng(0).integers(0, 8, (4, 4)).astype(U8)
    proto = model(parts, {"w": codes, "step": F32(1), "zero": U8(2), "other_zero": U8(5)})
    before = run(proto, random(3, 4), plain=True)[0]
    optimized(proto)
    np.testing.assert_allclose(run(proto, random(3, 4), plain=True)[0], before, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(-128, 127), min_size=1, max_size=4), min_size=1, max_size=4),
    st.booleans(),
)
def test_factors_are_the_largest_powers_of_two_with_levels_up_to_64(rows, by_channel):
    """So that two products with 8-bit activations fit into 16 bits, where processors add them up so."""
    width = max(map(len, rows))
    levels = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    factors = _factors(levels, [-1, 1] if by_channel else [])
    assert factors.dtype == np.int32 and factors.shape == ((len(rows), 1) if by_channel else ())
    assert set(np.log2(factors).flatten().tolist()) <= set(range(7))
    for row, factor in zip(levels if by_channel else [levels], factors.flatten(), strict=True):
        largest = np.abs(row).max()
        assert largest * factor <= 64 or factor == 1
        assert largest * factor * 2 > 64 or (factor == 64 and largest == 0)
        assert -128 <= (row * factor).min() <= (row * factor).max() <= 127


# --- biases -----------------------------------------------------------------------------------------------------------


def layer(kind, bias, *, shared=False, quantized=True, step=(0.5, 0.25, 2.0), input_step=0.125):
    """A Gemm or a Conv of integers with a bias."""
    shape, axis, x = ((3, 4), 0, ("b", 4)) if kind == "Gemm" else ((3, 4, 1, 1), 0, ("b", 4, 2, 2))
    codes = np.random.default_rng(0).integers(-127, 128, shape).astype(I8)
    codes[:, 0] = 127
    constants = {
        "w": codes, "w_step": F32(step), "w_zero": np.zeros(3, I8), "step": F32(input_step), "zero": U8(128),
        "bias": np.asarray(bias, F32),
    }  # fmt: skip
    parts = [
        *(rounding("x", "given") if quantized else [node("Identity", ["x"], "given")]),
        node("DequantizeLinear", ["w", "w_step", "w_zero"], "weight", axis=axis),
        node(kind, ["given", "weight", "bias"], "y", **({"transB": 1} if kind == "Gemm" else {})),
    ]
    if shared:
        parts.append(node("Identity", ["bias"], "z"))
    return model(parts, constants, x=x, outputs=("y", "z") if shared else ("y",))


every_kind = pytest.mark.parametrize("kind", ["Gemm", "Conv"])


def the_input(kind):
    return random(2, 4) if kind == "Gemm" else random(2, 4, 2, 2)


@every_kind
def test_biases_become_multiples_of_the_products_of_steps(kind):
    proto = layer(kind, [0.7, -0.05, 10.1])
    before = run(proto, the_input(kind), plain=True)[0]
    graph = optimized(proto)
    assert list(graph.biases) == ["bias"]
    assert graph.biases["bias"].dtype == F32
    assert graph.biases["bias"].tolist() == [0.6875, -0.0625, 10.0]  # multiples of 1/16, 1/32 and 1/4
    after = run(proto, the_input(kind), plain=True)[0]
    moved = (after - before).mean(0).reshape(3, -1)[:, 0]
    assert moved == pytest.approx([0.6875 - 0.7, -0.0125, -0.1], abs=1e-5)
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    if kind == "Gemm":  # whose bias onnxruntime wants as integers
        assert "bias" not in values
        assert values["bias_integer"].dtype == np.int32 and values["bias_integer"].tolist() == [11, -2, 40]
        assert values["bias_scale"].tolist() == [0.0625, 0.03125, 0.25]
    else:
        assert values["bias"].tolist() == graph.biases["bias"].tolist()


@every_kind
@pytest.mark.parametrize(
    "options",
    [{"quantized": False}, {"shared": True}, {"step": (1e-9, 1.0, 1.0), "input_step": 1e-3}],
    ids=["a float input", "a bias that others read", "more than int32 holds"],
)
def test_biases_that_stay(kind, options):
    proto = layer(kind, [0.7, -0.05, 10.1], **options)
    before = run(proto, the_input(kind), plain=True)
    graph = optimized(proto)
    assert graph.biases == {}
    assert all(np.array_equal(*pair) for pair in zip(run(proto, the_input(kind), plain=True), before, strict=True))


@every_kind
def test_steps_of_few_bits_are_made_finer_before_biases_are_rounded(kind):
    proto = layer(kind, [0.7, -0.05, 10.1])
    for tensor in proto.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) // 100, "w"))
    graph = optimized(proto)
    found = graph.biases["bias"] / (np.array([0.5, 0.25, 2.0]) * 0.125 / 64)  # levels are -2 .. 1 or 0 .. 1
    assert found.tolist() == np.round(found).tolist()
    assert np.abs(graph.biases["bias"] - [0.7, -0.05, 10.1]).max() <= 0.25 / 32 / 2


# --- BatchNorms -------------------------------------------------------------------------------------------------------


NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def normalized(codes, *, bias=None, step=None, zero=None, axis=0, gamma=(2.0, -0.5, 1.0), read_by=()):
    """A convolution of integers with a BatchNorm behind it."""
    channels, codes = 3, np.asarray(codes)
    rng = np.random.default_rng(3)
    steps = np.asarray([0.5, 0.25, 1.0] if step is None else step, F32)
    zeros = np.zeros(steps.shape, codes.dtype) if zero is None else np.asarray(zero, codes.dtype)
    constants = {
        "w": codes, "w_step": steps, "w_zero": zeros, "step": F32(0.125), "zero": U8(128),
        "norm.weight": F32(gamma), "norm.bias": F32(rng.standard_normal(channels)),
        "norm.running_mean": F32(rng.standard_normal(channels)), "norm.running_var": F32(rng.random(channels) + 0.5),
    }  # fmt: skip
    if bias is not None:
        constants["bias"] = F32(bias)
    parts = [
        *rounding("x", "given"),
        node("DequantizeLinear", ["w", "w_step", "w_zero"], "weight", **({"axis": axis} if steps.ndim else {})),
        node("Conv", ["given", "weight", *(["bias"] if bias is not None else [])], "conv"),
        node("BatchNormalization", ["conv", *NORM], "y", epsilon=1e-3),
        *read_by,
    ]
    proto = model(parts, constants, x=("b", codes.shape[1], 4, 4), outputs=("y", "z") if read_by else ("y",))
    return proto, constants


def few_bits(seed=0, shape=(3, 3, 2, 2), low=-8, high=7, dtype=I8):
    codes = np.random.default_rng(seed).integers(low, high + 1, shape).astype(dtype)
    codes[:, 0, 0, 0], codes[:, 0, 0, 1] = low, high
    return codes


@pytest.mark.parametrize("bias", [None, (0.3, -2.0, 1.1)])
@pytest.mark.parametrize("gamma", [(2.0, 0.5, 1.0), (2.0, -0.5, -1.0)], ids=["positive", "signs"])
@pytest.mark.parametrize("grid", ["levels", "codes"])
def test_batchnorms_go_into_the_steps(bias, gamma, grid, tmp_path):
    options = {"bias": bias, "gamma": gamma, **({"zero": [3, 8, 12]} if grid == "codes" else {})}
    codes = few_bits(low=0, high=15, dtype=U8) if grid == "codes" else few_bits()
    proto, constants = normalized(codes, **options)
    x = random(3, 3, 4, 4)
    before = run(proto, x, plain=True)[0]
    graph = optimized(proto)
    assert kinds(proto)["BatchNormalization"] == 0
    path = saved(proto, tmp_path)
    assert np.array_equal(unpacked(stored(path)["w"]), codes)
    gain = np.array(gamma) / np.sqrt(constants["norm.running_var"].astype(np.float64) + 1e-3)
    steps, found = known(path)["weight_scale"], known(path)["weight"]
    assert (steps > 0).all()
    zeros = np.array(options.get("zero", [0, 0, 0])).reshape(3, 1, 1, 1)
    expected = (codes - zeros) * (constants["w_step"] * gain).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    levels = known(path)["w_int8"]
    assert levels.min() >= -128 and levels.max() <= 127
    products = steps.reshape(-1) * 0.125
    np.testing.assert_allclose(run(proto, x, plain=True)[0], before, rtol=1e-4, atol=0.51 * products.max())
    total = known(path)["y_bias"] / products
    np.testing.assert_allclose(total, total.round(), atol=1e-3)
    shift = ((0 if bias is None else np.array(bias)) - constants["norm.running_mean"]) * gain
    assert list(graph.biases) == ["norm.bias"]
    np.testing.assert_allclose(graph.biases["norm.bias"] + shift, known(path)["y_bias"], atol=1e-5)
    assert np.abs(graph.biases["norm.bias"] - constants["norm.bias"]).max() <= products.max() * 0.51


@pytest.mark.parametrize("step", [None, 0.25])
def test_levels_that_no_sign_can_turn_are_moved_by_one(step, tmp_path):
    """Where the factor is negative; that is said, for the model to follow."""
    codes = few_bits(low=-128, high=127)
    proto, constants = normalized(codes, gamma=(2.0, -0.5, 0.0), step=step)
    lowest = (codes == -128) & (np.arange(3) == 1).reshape(3, 1, 1, 1)
    expected = run(normalized(codes + lowest.astype(I8), gamma=(2.0, -0.5, 0.0), step=step)[0], x := random(3, 3, 4, 4))
    graph = optimized(proto)
    assert kinds(proto)["BatchNormalization"] == 0 and list(graph.moved) == ["w"]
    which, values = graph.moved["w"]
    assert np.array_equal(which, lowest) and 1 <= lowest.sum() == len(values)
    assert (values == -127 * np.broadcast_to(constants["w_step"], 3)[1]).all()
    levels = known(saved(proto, tmp_path))["w"]
    assert np.array_equal(levels[:2], (codes + lowest)[:2])
    np.testing.assert_allclose(run(proto, x, plain=True)[0], expected[0], rtol=1e-4, atol=0.1)


def test_channels_that_a_norm_turns_off_are_pruned(tmp_path):
    proto, constants = normalized(few_bits(), gamma=(2.0, 0.0, 1.0))
    before = run(proto, random(3, 3, 4, 4), plain=True)[0]
    optimized(proto)
    assert kinds(proto)["BatchNormalization"] == 0
    path = saved(proto, tmp_path)
    assert not unpacked(stored(path)["w"])[1].any() and unpacked(stored(path)["w"])[0].any()
    assert known(path)["y_bias"][1] == pytest.approx(constants["norm.bias"][1], abs=1e-3)
    np.testing.assert_allclose(run(proto, random(3, 3, 4, 4), plain=True)[0], before, rtol=1e-4, atol=0.01)


@pytest.mark.parametrize(
    ("codes", "options"),
    [
        (few_bits(low=0, high=255, dtype=U8), {"zero": [3, 8, 12]}),
        (few_bits(), {"read_by": [node("Identity", ["conv"], "z")]}),
        (few_bits(), {"read_by": [node("Identity", ["weight"], "z")]}),
        (few_bits(), {"read_by": [node("DequantizeLinear", ["w", "w_step", "w_zero"], "z", axis=0)]}),
    ],
    ids=["zero points of 8 bits", "a sum read twice", "a weight read twice", "integers read twice"],
)  # fmt: skip
def test_batchnorms_that_stay(codes, options):
    proto, _ = normalized(codes, **options)
    before = run(proto, random(3, 3, 4, 4), plain=True)
    optimized(proto)
    assert kinds(proto)["BatchNormalization"] == 1
    after = run(proto, random(3, 3, 4, 4), plain=True)
    for left, right in zip(after, before, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def test_batchnorms_whose_constants_are_shared():
    """As torch.onnx does it with equal constants of up to 1024 bytes: of norms without biases, say."""
    proto, constants = normalized(few_bits(), bias=(0.3, -2.0, 1.1))
    parts = [
        *proto.graph.node[:-1],
        node("BatchNormalization", ["conv", *NORM], "one", epsilon=1e-3),
        *rounding("one", "given_again"),
        node("DequantizeLinear", ["w_again", "w_step", "w_zero"], "weight_again", axis=0),
        node("Conv", ["given_again", "weight_again"], "conv_again"),
        node("BatchNormalization", ["conv_again", *NORM], "y", epsilon=1e-3),
    ]
    proto = model(parts, {**constants, "w_again": few_bits(1)}, x=("b", 3, 4, 4))
    before = run(proto, random(3, 3, 4, 4), plain=True)[0]
    optimized(proto)
    assert kinds(proto)["BatchNormalization"] == 0
    after = run(proto, random(3, 3, 4, 4), plain=True)[0]
    assert np.quantile(np.abs(after - before), 0.9) < 0.05  # values beside the middle of two levels may move


def test_batchnorms_go_into_one_step():
    proto, _ = normalized(few_bits(), step=0.5)
    before = run(proto, random(3, 3, 4, 4), plain=True)[0]
    optimized(proto)
    assert kinds(proto)["BatchNormalization"] == 0
    np.testing.assert_allclose(run(proto, random(3, 3, 4, 4), plain=True)[0], before, rtol=1e-4, atol=0.05)


# --- what is written --------------------------------------------------------------------------------------------------


def test_notes_and_what_nobody_reads_are_left_out():
    proto = product(np.array([[-3, 5], [7, -8]], I8))
    proto.graph.initializer.append(numpy_helper.from_array(random(100), "nobody"))
    proto.graph.value_info.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [2, 2]))
    owners = (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output)
    for owner in owners:
        owner.doc_string = "somebody/secret.py"
        helper.set_model_props(owner, {"place": "somebody/secret.py"})
    optimized(proto)
    assert b"somebody" not in proto.SerializeToString()
    assert {t.name for t in proto.graph.initializer} == {
        "fc.weight", "fc.weight_factors", "weight_scale", "weight_zeros",
    }  # fmt: skip
    assert not proto.graph.value_info


def test_a_constant_that_is_an_output_is_written():
    proto = product(np.array([[-3, 5], [7, -8]], I8))
    proto.graph.initializer.append(numpy_helper.from_array(random(3), "z"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [3]))
    optimized(proto)
    assert np.array_equal(run(proto, random(1, 2), plain=True)[1], random(3))


def test_a_graph_without_quantizers_stays():
    proto = model([node("Relu", ["x"], "y")], {})
    assert optimized(proto).stored == {}
    assert kinds(proto) == {"Relu": 1}


def test_a_second_time_changes_nothing():
    proto = layer("Gemm", [0.7, -0.05, 10.1])
    optimized(proto)
    before = proto.SerializeToString(deterministic=True)
    graph = optimized(proto)
    assert graph.biases == {}
    assert proto.SerializeToString(deterministic=True) == before
