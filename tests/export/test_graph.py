"""Changes of ONNX graphs, on graphs made by hand: the function stays, in the numbers of onnxruntime."""

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.export.exported import run
from tests.export.graphs import F32, I8, U8, kinds, layer, model, node, optimized, product, random, rounding

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
