"""Biases in ONNX graphs made by hand become multiples of products of steps."""

import numpy as np
import pytest
from onnx import numpy_helper

from tests.export.exported import run
from tests.export.graphs import F32, layer, optimized, random

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
    [{"quantized": False}, {"shared": True}, {"step": 1e-9, "input_step": 1e-3}],
    ids=["a float input", "a bias that others read", "more than int32 holds, one step for all"],
)
def test_biases_that_stay(kind, options):
    proto = layer(kind, [0.7, -0.05, 10.1], **options)
    before = run(proto, the_input(kind), plain=True)
    graph = optimized(proto)
    assert graph.biases == {}
    assert all(np.array_equal(*pair) for pair in zip(run(proto, the_input(kind), plain=True), before, strict=True))


@every_kind
@pytest.mark.parametrize("step", [0.5 * 0.7 / 2**31 / 0.125, 1e-15])
def test_a_channel_that_is_only_its_bias_gets_a_step_that_its_bias_fits(kind, step):
    """Such as one whose filter has died in training; the layer stays one of integers, and gives the same."""
    bias = np.array([0.7, -0.05, 10.1], F32)
    proto = layer(kind, bias, step=(step, 0.25, 2.0))
    before = run(proto, 15 * np.sign(the_input(kind)), plain=True)[0]
    graph = optimized(proto)
    after = run(proto, 15 * np.sign(the_input(kind)), plain=True)[0]
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    weight = next(n for n in proto.graph.node if n.output[0] == "weight")
    codes = graph.biases["bias"] / (np.float64(values[weight.input[1]]) * 0.125)
    assert np.abs(codes).max() < 2**31 and codes[1:] == pytest.approx(np.round(codes[1:]))
    assert graph.biases["bias"][0] == pytest.approx(0.7, abs=1e-7)
    first = np.moveaxis(after - before, 1, 0)[0]
    assert np.abs(first).max() < 4 * 1.2e-7 * 0.7 + 1e-7
    if step > 1e-12:  # what the products add is seen, and kept
        assert np.abs(np.moveaxis(before, 1, 0)[0] - F32(0.7)).max() > 2e-6


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
