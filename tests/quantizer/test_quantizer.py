"""Quantizer modules against a scalar float64 loop, and their state."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.errors import DataError, SpecError, StateError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.histogram import Histogram
from lq.quantizer.spec import WIDTHS, QuantSpec
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout
from tests.quantizer.test_functional import reference, reference_gradients

quick = settings(max_examples=40, deadline=None, database=None)
widths = st.sampled_from(WIDTHS)
kinds = st.fixed_dictionaries(
    {"symmetric": st.booleans(), "signed": st.sampled_from([None, True]), "power_of_two": st.booleans()}
)


def weight_quantizer(weight, bits, **options):
    """A calibrated quantizer of a weight with its channels along dimension 0."""
    quantizer = WeightQuantizer(QuantSpec(bits, **options), ChannelLayout(weight.shape[0]), "w")
    quantizer.calibrate(weight)
    return quantizer


def activation_quantizer(x, bits, **options):
    quantizer = ActivationQuantizer(QuantSpec(bits, per_channel=False, **options), "x")
    histogram = Histogram()
    histogram.update(x)
    quantizer.calibrate(histogram)
    return quantizer


def grids(quantizer, channels):
    """Step, lowest and highest level and offset of each channel's grid, from the state."""
    state = (quantizer.step.detach(), quantizer.zero_point, quantizer.bits)
    for step, zero, bits in zip(*(t.expand(channels).tolist() for t in state), strict=True):
        yield step, -zero, 2.0**bits - 1 - zero, zero % 1


def assert_rounded(quantizer, x, y):
    """`y` is `x` rounded by a scalar loop, but for values whose rounding is a tie within float32."""
    compared = 0
    for row, rounded, (step, low, high, offset) in zip(
        x.double().tolist(), y.double().tolist(), grids(quantizer, len(x)), strict=True
    ):
        for value, got in zip(row, rounded, strict=True):
            level = value / step - offset
            if low <= level + offset <= high and abs(level % 1 - 0.5) < max(1e-4, 4e-7 * abs(level)):
                continue
            assert got == pytest.approx(reference(value, step, low, high, offset), rel=1e-6, abs=1e-30)
            compared += 1
    assert compared > 0.9 * x.numel()


@quick
@given(st.lists(widths, min_size=1, max_size=5), st.integers(1, 40), kinds, st.integers(0, 9), st.booleans())
def test_weights_are_those_of_a_scalar_loop(bits, size, kind, seed, positive):
    weight = torch.randn(len(bits), size, generator=torch.Generator().manual_seed(seed))
    weight = weight.abs() if positive else weight
    quantizer = weight_quantizer(weight, tuple(bits), **kind)
    rounded = quantizer(weight).detach()
    assert quantizer.calibrated
    assert (quantizer.step > 0).all()
    assert torch.isfinite(quantizer.step).all()
    if weight.numel() >= 20:
        assert_rounded(quantizer, weight, rounded)
    for row, now in zip(rounded, bits, strict=True):
        assert row.unique().numel() <= 2**now
        if now == 0:
            assert row.abs().max() == 0
    torch.testing.assert_close(quantizer(rounded).detach(), rounded, rtol=0, atol=0)


@quick
@given(widths, st.sampled_from([(4, 30), (3, 2, 5, 4), (2, 6, 10)]), kinds, st.integers(0, 9), st.booleans())
def test_activations_are_those_of_a_scalar_loop(bits, shape, kind, seed, positive):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    x = x.abs() if positive else x
    quantizer = activation_quantizer(x, bits, **kind)
    rounded = quantizer(x)
    assert rounded.shape == x.shape
    assert rounded.unique().numel() <= 2**bits
    assert_rounded(quantizer, x.flatten(1), rounded.flatten(1))
    assert torch.equal(quantizer(rounded), rounded)
    if positive:
        assert quantizer.zero_point == 0 or kind["signed"]


@pytest.mark.parametrize("values", [[1.0, -3.0, 0.2], [0.0, 0.0], [1e-3]])
def test_one_bit_has_two_levels_half_a_step_from_zero(values):
    weight = torch.tensor([values])
    quantizer = weight_quantizer(weight, 1, signed=True)
    half = quantizer.step.item() / 2
    assert quantizer(weight).abs().unique().tolist() == [half]
    # A zero lies on the tie of the two levels; half to even makes it the lower or the upper one, never zero.
    assert {abs(v) for v in quantizer(torch.tensor([[-9.0, 9.0]])).flatten().tolist()} == {half}


def test_one_step_for_the_whole_weight():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    quantizer = weight_quantizer(weight, 3, per_channel=False)
    assert quantizer.step.shape == ()
    assert_rounded(quantizer, weight, quantizer(weight).detach())
    assert quantizer(weight).unique().numel() <= 8


@pytest.mark.parametrize("bits", [3, (2, 0, 1, 8)])
def test_learned_steps_have_lsqs_scaled_gradient(bits):
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
    quantizer = weight_quantizer(weight, bits, signed=True)
    quantizer.set_estimator("lsq")
    grad = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    quantizer(weight).backward(grad)
    for row, g, step_grad, (step, low, high, offset) in zip(
        weight.tolist(), grad.tolist(), quantizer.log2_step.grad.tolist(), grids(quantizer, 4), strict=True
    ):
        total = sum(a * reference_gradients(v, step, low, high, offset)[1] for a, v in zip(g, row, strict=True))
        expected = total * math.log(2) * step / math.sqrt(9 * max(high, 0.5))
        assert step_grad == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_learned_activation_steps_count_values_per_sample():
    x = torch.tensor([[9.0, 9.0, 9.0, 9.0]] * 5)
    quantizer = activation_quantizer(torch.tensor([[0.0, 3.0]]), 2, range="minmax")
    quantizer.set_estimator("lsq")
    quantizer(x).sum().backward()
    assert quantizer.log2_step.grad.item() == pytest.approx(20 * 3 * math.log(2) / math.sqrt(4 * 3), rel=1e-5)


def test_fixed_steps_stay_without_gradient():
    weight = torch.randn(2, 4, requires_grad=True)
    quantizer = weight_quantizer(weight, 4)
    quantizer(weight).sum().backward()
    assert quantizer.log2_step.grad is None
    quantizer.set_estimator("lsq")
    assert quantizer.log2_step.requires_grad
    quantizer.set_estimator("ste")
    assert not quantizer.log2_step.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_stays_float32(dtype):
    quantizer = weight_quantizer(torch.randn(3, 5), 4)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.to(dtype)
    for key, value in quantizer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("learned", [False, True])
def test_values_keep_their_dtype_and_train(dtype, learned):
    x = torch.randn(4, 6).to(dtype)
    quantizer = activation_quantizer(x, 4)
    quantizer.set_estimator("lsq" if learned else "ste")
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    assert y.dtype == leaf.grad.dtype == dtype
    assert torch.equal(y, quantizer(x.float()).to(dtype))
    assert (quantizer.log2_step.grad is not None) == learned


def test_state_round_trip():
    weight = torch.randn(3, 5)
    quantizer = weight_quantizer(weight, (0, 1, 5))
    fresh = WeightQuantizer(QuantSpec(8), ChannelLayout(3))
    assert not fresh.calibrated
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.calibrated
    assert torch.equal(fresh(weight), quantizer(weight))
    assert set(quantizer.state_dict()) == {"log2_step", "zero_point", "bits"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("old", "new"), [(8, 4), (2, 8), (4, 1), (1, 4)])
def test_set_bits_keeps_the_range(old, new, symmetric):
    x = torch.linspace(-1, 3, 101)[None]
    quantizer = activation_quantizer(x, old, symmetric=symmetric, range="minmax")
    step, low, high, _ = next(grids(quantizer, 1))
    quantizer.set_bits(new)
    new_step, new_low, new_high, _ = next(grids(quantizer, 1))
    assert (new_high - new_low) * new_step == pytest.approx((high - low) * step, rel=1e-5)
    assert new_high - new_low == 2**new - 1
    assert quantizer(x).unique().numel() <= 2**new


def test_set_bits_prunes_channels():
    weight = torch.randn(3, 5)
    quantizer = weight_quantizer(weight, 4)
    quantizer.set_bits((4, 0, 4))
    assert quantizer(weight).abs().amax(1).gt(0).tolist() == [True, False, True]


def test_repr_shows_widths_and_state():
    assert "bits=[0, 4], 2 channels, calibrated=True" in repr(weight_quantizer(torch.randn(2, 3), (0, 4)))
    assert "bits=8, per tensor, calibrated=False" in repr(ActivationQuantizer(QuantSpec(8, per_channel=False)))


def test_quantized_weight_is_computed_once_per_version(monkeypatch):
    weight = nn.Parameter(torch.randn(2, 3))
    quantizer = weight_quantizer(weight, 4).eval()
    calls = []
    original = WeightQuantizer._quantize
    monkeypatch.setattr(WeightQuantizer, "_quantize", lambda self, w: calls.append(1) or original(self, w))
    with torch.no_grad():
        assert quantizer(weight) is quantizer(weight)
    assert len(calls) == 1
    quantizer(weight)
    assert len(calls) == 2, "with gradients nothing is kept"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weight_quantizer(torch.ones(3, 2), (4, 4)), "w: 2 widths were given for 3 channels"),
        (lambda: weight_quantizer(torch.ones(3, 2), 4).set_bits((4, 4)), "w: 2 widths were given for 3 channels"),
        (
            lambda: activation_quantizer(torch.ones(3, 2), 4).set_bits((4, 4)),
            "x: 2 widths were given for 1 channels",
        ),
        (lambda: weight_quantizer(torch.ones(3, 2), 4).set_bits(9), "bits=9 is not a width"),
        (
            lambda: weight_quantizer(torch.ones(3, 2), 4).set_estimator("pact"),
            r"estimator='pact' is unknown; use one of \('ste', 'lsq', 'lsq_plus'",
        ),
        (
            lambda: weight_quantizer(torch.ones(3, 2), 4, power_of_two=True).set_estimator("lsq"),
            "w: power-of-two steps cannot be learned; use estimator='ste'",
        ),
    ],
)
def test_spec_errors(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_activations_need_a_range():
    with pytest.raises(StateError, match=r"x has no range yet: run lq.calibrate\(model, batches\) or load"):
        ActivationQuantizer(QuantSpec(8, per_channel=False), "x")(torch.ones(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad):
    x = torch.tensor([[1.0, bad]])
    with pytest.raises(DataError, match="w has 1 NaN or Inf of 2 values"):
        weight_quantizer(x, 4)
    with pytest.raises(DataError, match="w has 1 NaN or Inf of 2 values"):
        weight_quantizer(torch.ones(1, 2), 4)(x)
    with pytest.raises(DataError, match="x has 1 NaN or Inf of 2 values"):
        activation_quantizer(torch.ones(1, 2), 8)(x)


def test_a_sum_that_overflows_is_no_error():
    x = torch.full((2, 8), 3e38)
    assert torch.isfinite(activation_quantizer(x, 8)(x)).all()


@pytest.mark.parametrize("name", ["ste", "lsq", "lsq_plus", "noise_scale"])
def test_only_what_is_learned_is_a_parameter(name):
    weight = weight_quantizer(torch.randn(3, 5), 4)
    activation = activation_quantizer(torch.randn(20), 4, symmetric=False)
    keys = list(weight.state_dict()), list(activation.state_dict())
    before = [{key: value.clone() for key, value in q.state_dict().items()} for q in (weight, activation)]
    learned = {
        "ste": (set(), set()),
        "lsq": ({"log2_step"}, {"log2_step"}),
        "lsq_plus": ({"log2_step"}, {"log2_step", "zero_point"}),
        "noise_scale": ({"log2_step"}, {"log2_step", "zero_point"}),
    }[name]
    for quantizer, parts, names, state in zip((weight, activation), learned, keys, before, strict=True):
        quantizer.set_estimator(name)
        assert {key for key, _ in quantizer.named_parameters()} == parts
        assert {key for key, _ in quantizer.named_buffers()} == {"log2_step", "zero_point", "bits"} - parts
        assert all(parameter.requires_grad for parameter in quantizer.parameters())
        assert sorted(quantizer.state_dict()) == sorted(names)
        assert all(torch.equal(value, state[key]) for key, value in quantizer.state_dict().items())


def test_an_estimator_that_is_set_again_keeps_its_parameters():
    quantizer = weight_quantizer(torch.randn(3, 5), 4)
    quantizer.set_estimator("lsq")
    step = quantizer.log2_step
    quantizer.log2_step.requires_grad_(False)
    quantizer.set_estimator("noise_scale")
    assert quantizer.log2_step is step and step.requires_grad


def test_an_optimizer_that_holds_what_was_learned_moves_nothing_later():
    quantizer = weight_quantizer(torch.randn(3, 5), 4)
    quantizer.set_estimator("lsq")
    old = quantizer.log2_step
    old.grad = torch.ones_like(old)
    quantizer.set_estimator("ste")
    before = quantizer.log2_step.clone()
    torch.optim.SGD([old], lr=1.0).step()
    assert torch.equal(quantizer.log2_step, before) and not old.requires_grad


def test_grids_are_float32_whatever_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        layer = nn.Sequential(nn.Linear(4, 3))
        x = torch.randn(8, 4)
        lq.calibrate(lq.attach(layer, 4, 8, first_last=None, estimator="lsq"), [x])
        y = layer(x)
        y.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float64
    assert all(t.dtype == torch.float32 for q in quantizers(layer) for t in q.state_dict().values())
