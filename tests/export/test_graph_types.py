"""Weights in ONNX graphs made by hand take the smallest type, and are shared only where they are alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from lq.export.graph import OPSET, OPSET_OF_INT2, _factors
from tests.export.exported import known, nodes, run, stored, unpacked
from tests.export.graphs import F32, I8, U8, kinds, model, node, optimized, product, random, saved

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
