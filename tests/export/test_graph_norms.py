"""BatchNorms in ONNX graphs made by hand go into steps and biases."""

import numpy as np
import pytest

from tests.export.exported import known, run, stored, unpacked
from tests.export.graphs import F32, I8, U8, kinds, model, node, optimized, random, rounding, saved

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
