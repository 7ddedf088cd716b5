"""Gradients of every estimator, through the quantizers, against scalar loops over the formulas of their papers."""

import math

import pytest
import torch

import lq
import lq.quantizer.gradients
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.estimators import ESTIMATORS, EWGS, LSQ, AdaptiveEWGS, LSQPlus, NoiseScale, StableQAT, estimator
from lq.quantizer.spec import QuantSpec
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout
from tests.quantizer.estimators.formulas import Case, by_row, rows, values

CHANNELS, COUNT = 3, 40
LOG2_STEPS = torch.tensor([-1.0, 0.0, -2.0])


def weight_quantizer(bits, name, **spec):
    """A quantizer of weights (3, 40) with the steps above."""
    width = bits if isinstance(bits, int) else tuple(bits)
    made = WeightQuantizer(QuantSpec(width, signed=True, **spec), ChannelLayout(CHANNELS), "w")
    made.calibrate(torch.ones(CHANNELS, COUNT))
    with torch.no_grad():
        made.log2_step.copy_(LOG2_STEPS if made.bits.ndim else LOG2_STEPS[0])
    made.set_estimator(name)
    return made


def activation_quantizer(bits, name, zero_point, **spec):
    """A quantizer of activations with the first step above."""
    spec = {"symmetric": False, **spec}
    made = ActivationQuantizer(QuantSpec(bits, per_channel=False, **spec), "a")
    with torch.no_grad():
        made.log2_step.copy_(LOG2_STEPS[0])
        made.zero_point.fill_(zero_point)
    made.refresh()
    made.set_estimator(name)
    return made


def oracle_of(quantizer, x, grad):
    """The rows of `x` with the grid that the quantizer should have by its state."""
    single = quantizer.bits.ndim == 0
    if single:
        x, grad = x.reshape(1, -1), grad.reshape(1, -1)
    zero_point = quantizer.zero_point.detach().reshape(-1)
    if not quantizer.spec.symmetric:
        zero_point = zero_point.round()
    bits = quantizer.bits.detach().reshape(-1)
    low, high = -zero_point, torch.exp2(bits) - 1 - zero_point
    offset = torch.where(bits < 2, torch.remainder(low, 1.0), 0.0)
    return rows(x, grad, quantizer.log2_step.detach().reshape(-1), low, high, offset)


def run(quantizer, x, grad):
    x = x.clone().requires_grad_()
    quantizer(x).backward(grad)
    return x.grad


KINDS = {
    "weights, 3 bits": lambda name: weight_quantizer(3, name),
    "weights, 1 bit": lambda name: weight_quantizer(1, name),
    "weights, 2 to 4 bits": lambda name: weight_quantizer([4, 2, 3], name),
    "weights, pruned channel": lambda name: weight_quantizer([4, 0, 1], name),
    "weights, one step": lambda name: weight_quantizer(3, name, per_channel=False),
    "activations, unsigned": lambda name: activation_quantizer(3, name, 0.0),
    "activations, zero point": lambda name: activation_quantizer(3, name, 3.0),
    "activations, symmetric": lambda name: activation_quantizer(3, name, 4.0, symmetric=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_name = pytest.mark.parametrize("name", ESTIMATORS)


def setting(kind, name, seed=0):
    quantizer = KINDS[kind](name)
    offset = torch.remainder(-quantizer.zero_point.detach().reshape(-1), 1.0).expand(CHANNELS)
    steps = torch.exp2(quantizer.log2_step.detach().reshape(-1)).expand(CHANNELS)
    return quantizer, *values(CHANNELS, COUNT, steps, offset, seed=seed)


def scale_of(quantizer, x):
    """LSQ's factor on gradients to the grid: one number for each step."""
    count = x.shape[1]
    if isinstance(quantizer, WeightQuantizer) and quantizer.bits.ndim == 0:
        count = x.numel()
    high = torch.exp2(quantizer.bits.detach()) - 1 - quantizer.zero_point.detach()
    return 1 / (high.clamp(min=0.5) * count).sqrt()


@every_kind
@pytest.mark.parametrize("block", [1 << 18, 50])
@pytest.mark.parametrize("name", ["ste", "lsq", "lsq_plus", "noise_scale"])
def test_gradient_to_values_is_straight_through(kind, name, block, monkeypatch):
    monkeypatch.setattr(lq.quantizer.gradients, "_BLOCK", block)
    quantizer, x, grad = setting(kind, name)
    expected = torch.tensor([case.straight_through() for case in oracle_of(quantizer, x, grad)])
    torch.testing.assert_close(run(quantizer, x, grad), expected.view(x.shape))
    assert expected.any()


@every_kind
@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "ewgs", "adaptive_ewgs", "stableqat"])
def test_gradient_to_steps_is_that_of_lsq(kind, name):
    quantizer, x, grad = setting(kind, name)
    run(quantizer, x, grad)
    expected = by_row(oracle_of(quantizer, x, grad), Case.step_gradient).view(quantizer.bits.shape)
    torch.testing.assert_close(quantizer.log2_step.grad, expected * scale_of(quantizer, x), rtol=1e-4, atol=1e-5)


def test_ste_learns_nothing():
    quantizer, x, grad = setting("weights, 3 bits", "ste")
    run(quantizer, x, grad)
    assert not any(p.requires_grad for p in quantizer.parameters())
    assert all(p.grad is None for p in quantizer.parameters())


def test_lsq_plus_learns_the_zero_point_by_what_is_outside():
    quantizer, x, grad = setting("activations, zero point", "lsq_plus")
    run(quantizer, x, grad)
    (case,) = oracle_of(quantizer, x, grad)
    expected = -(case.below() + case.above()) * float(scale_of(quantizer, x))
    assert expected != 0
    assert float(quantizer.zero_point.grad) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("moved", [-0.3, 0.4])
def test_lsq_plus_uses_whole_zero_points(moved):
    quantizer, x, _ = setting("activations, zero point", "lsq_plus")
    before = quantizer(x).detach()
    with torch.no_grad():
        quantizer.zero_point.add_(moved)
    assert torch.equal(quantizer(x), before)
    assert not quantizer(torch.zeros(1, 1)).any()
    quantizer.set_estimator("ste")
    quantizer.refresh()
    assert torch.equal(quantizer(x), before)  # and so does whoever loads the state later


@pytest.mark.parametrize("kind", ["activations, unsigned", "activations, symmetric", "weights, 3 bits"])
def test_lsq_plus_leaves_other_zero_points_alone(kind):
    quantizer, x, grad = setting(kind, "lsq_plus")
    run(quantizer, x, grad)
    learned = quantizer.zero_point.grad
    assert learned is None or not learned.any()
    plain, x, grad = setting(kind, "lsq")
    run(plain, x, grad)
    assert torch.equal(plain.log2_step.grad, quantizer.log2_step.grad)


@every_kind
@pytest.mark.parametrize("delta", [0.0, 0.01, 0.5])
def test_ewgs_weighs_by_the_signed_error(kind, delta):
    quantizer, x, grad = setting(kind, EWGS(delta))
    found = run(quantizer, x, grad)
    expected = [
        [g * (1 + delta * math.copysign(1, g) * (v - q)) if case.inside(v) else 0.0 for g, v, q in case.levels()]
        for case in oracle_of(quantizer, x, grad)
    ]
    torch.testing.assert_close(found, torch.tensor(expected).view(x.shape))


@every_kind
def test_adaptive_ewgs_fits_its_strength_to_each_row(kind):
    quantizer, x, grad = setting(kind, AdaptiveEWGS())
    found = run(quantizer, x, grad)
    expected = []
    for case in oracle_of(quantizer, x, grad):
        errors = [v - q if case.inside(v) else 0.0 for _, v, q in case.levels()]
        signs = [math.copysign(1, g) if case.inside(v) else 0.0 for g, v, _ in case.levels()]
        mean = sum(errors) / len(errors)
        variance = max(sum((e - mean) ** 2 for e in errors) / len(errors), 1e-3)
        delta = sum(s * e for s, e in zip(signs, errors, strict=True)) / len(errors) / variance
        taken = [min(delta * s * e, 0.99) for s, e in zip(signs, errors, strict=True)]
        expected.append([g * (1 - t) for g, t in zip(case.straight_through(), taken, strict=True)])
    torch.testing.assert_close(found, torch.tensor(expected).view(x.shape), rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("amplitude", [0.0, 0.21])
def test_stableqat_weighs_by_the_slope_of_the_first_harmonic(kind, amplitude):
    """The published factor, with v counted from the grid's own zero: ``v + round(v)`` shifts by even numbers."""
    quantizer, x, grad = setting(kind, StableQAT(amplitude, activations=True))
    found = run(quantizer, x, grad)
    expected = []
    for case in oracle_of(quantizer, x, grad):
        factors = [
            2 / (1 + math.sqrt(2) * math.pi * amplitude * math.cos(math.pi * (v - case.offset + q - case.offset))) - 1
            for _, v, q in case.levels()
        ]
        expected.append([g * f for g, f in zip(case.straight_through(), factors, strict=True)])
    torch.testing.assert_close(found, torch.tensor(expected).view(x.shape), rtol=1e-5, atol=1e-6)
    assert found.any()


def test_stableqat_is_bounded_and_a_third_on_average():
    made = weight_quantizer(8, StableQAT(), per_channel=False)
    x = torch.linspace(0.5 - 4, 0.5 + 4, 80_001)[:-1].view(1, -1) * made.step.detach()
    factor = run(made, x, torch.ones_like(x))
    k = math.sqrt(2) * math.pi * 0.21
    assert float(factor.min()) == pytest.approx((1 - k) / (1 + k), abs=1e-5)
    assert float(factor.max()) == pytest.approx(1.0, abs=1e-3)
    assert float(factor.mean()) == pytest.approx(4 / math.pi * math.acos(k) / math.sqrt(1 - k * k) - 1, abs=1e-3)
    assert float(factor.mean()) == pytest.approx(0.302, abs=1e-3)


def test_stableqat_leaves_activations_alone():
    quantizer, x, grad = setting("activations, zero point", "stableqat")
    plain, _, _ = setting("activations, zero point", "lsq")
    assert torch.equal(run(quantizer, x, grad), run(plain, x, grad))
    assert quantizer.estimator == LSQ()


# --- noise scale ----------------------------------------------------------------------------------------------------


def fractional(kind, width):
    """A setting at a width between integers."""
    quantizer, x, grad = setting(kind, NoiseScale(widths=True))
    with torch.no_grad():
        quantizer.bits.fill_(width)
        if quantizer._symmetric:
            quantizer.zero_point.copy_(lq.quantizer.levels.middle(quantizer.bits))
    quantizer.refresh()
    return quantizer, 1.3 * x + 0.013, grad  # away from the bounds, some beyond them


@pytest.mark.parametrize("width", [3.0, 2.4, 1.3, 0.6])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("weights, 2 to 4 bits", "weights, pruned channel")])
def test_noise_scale_learns_widths_by_the_bounds(kind, width):
    quantizer, x, grad = fractional(kind, width)
    run(quantizer, x, grad)
    cases = oracle_of(quantizer, x, grad)
    levels = 2**width * math.log(2)
    if quantizer._symmetric:
        slope = 2**width / 2 * math.log(2) if width >= 2 or width < 1 else 1.5
        expected = by_row(cases, lambda case: -slope * case.below() + (levels - slope) * case.above())
    else:
        expected = by_row(cases, lambda case: levels * case.above())
    assert expected.any()
    torch.testing.assert_close(quantizer.bits.grad.reshape(-1), expected, rtol=1e-3, atol=1e-4)


@every_kind
def test_noise_of_the_step_has_the_published_mean_and_variance(kind):
    drawn = []
    for seed in range(150):
        quantizer, x, grad = setting(kind, NoiseScale(), seed)
        run(quantizer, x, grad)
        cases = oracle_of(quantizer, x, grad)
        # s * sum(g * r) / sqrt(3), r = +-1/2, has the variance s^2 * |g|^2 / 12; and dL/d(log2 s) = ln 2 * s * dL/ds
        deviation = by_row(cases, lambda c: math.log(2) * c.step**2 * math.sqrt(sum(g * g for g in c.grads) / 12))
        drawn.append((quantizer.log2_step.grad.reshape(-1) - by_row(cases, Case.step_gradient)) / deviation)
    found = torch.cat(drawn)
    assert abs(found.mean()) < 4 / math.sqrt(len(found))
    assert found.std() == pytest.approx(1.0, abs=0.15)
    assert found.abs().max() < 2  # uniform, not normal: sqrt(12) / 2 at most


def test_widths_are_learned_on_request():
    for widths in (False, True):
        quantizer, x, grad = setting("weights, 3 bits", NoiseScale(widths=widths))
        run(quantizer, x, grad)
        assert (quantizer.bits.grad is not None) is widths


def test_noise_leaves_no_trace_and_repeats():
    found = []
    for _ in range(2):
        quantizer, x, grad = setting("weights, 3 bits", NoiseScale())
        state = torch.get_rng_state()
        run(quantizer, x, grad)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(quantizer.log2_step.grad)
    assert torch.equal(*found)


def test_widths_go_on_without_a_jump():
    widths = torch.cat([torch.linspace(0, 8, 2001)])
    middles = lq.quantizer.levels.middle(widths)
    assert (middles.diff() >= 0).all() and middles.diff().max() < 0.4
    whole = torch.tensor([0.0, 1.0, 2.0, 3.0, 8.0])
    assert lq.quantizer.levels.middle(whole).tolist() == [0.0, 0.5, 2.0, 4.0, 128.0]
    x = torch.linspace(-3, 3, 601).expand(1, -1)
    made = WeightQuantizer(QuantSpec(3, signed=True), ChannelLayout(1), "w")
    made.calibrate(x)
    made.set_estimator(NoiseScale(widths=True))
    previous = made(x).detach()
    for width in torch.linspace(3, 0, 3001)[1:]:
        with torch.no_grad():
            made.bits.fill_(width)
        now = made(x).detach()
        # single values may pass a threshold; the rest moves by no more than the bounds do
        assert ((now - previous).abs() < 0.02 * made.step).float().mean() > 0.97
        previous = now
    assert not previous.any()


# --- all ------------------------------------------------------------------------------------------------------------


@every_name
@every_kind
def test_forward_is_the_same_for_all(kind, name):
    one, x, _ = setting(kind, name)
    assert torch.equal(one(x), setting(kind, "ste")[0](x))


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_values_and_the_grid_float32(name, dtype):
    quantizer = weight_quantizer(3, name)
    x = torch.randn(CHANNELS, COUNT).to(dtype).requires_grad_()
    quantizer(x).float().square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in quantizer.parameters())


@every_name
@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_memory_layout_does_not_matter(name, layout):
    x, grad = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    found = []
    for change in (lambda t: t, {"transposed": lambda t: t.mT.contiguous().mT}.get(layout, _channels_last)):
        quantizer = weight_quantizer(3, name)
        steps = None if name == "noise_scale" else quantizer.log2_step.grad  # its noise depends on the last bits
        found.append([run(quantizer, change(x), change(grad)), steps, quantizer.bits.grad])
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def _channels_last(x):
    return x.to(memory_format=torch.channels_last)


def test_names_and_objects():
    assert estimator("lsq") == LSQ() and estimator(own := EWGS(0.2)) is own
    assert {type(estimator(name)) for name in ESTIMATORS} == set(ESTIMATORS.values())
    assert isinstance(estimator("lsq_plus"), LSQPlus)
    with pytest.raises(lq.SpecError, match=r"estimator='pact' is unknown; use one of \('ste', 'lsq'"):
        estimator("pact")


@pytest.mark.parametrize("delta", [-0.1, 2.0])
def test_ewgs_that_would_turn_gradients_round(delta):
    with pytest.raises(lq.SpecError, match=rf"delta={delta} is not in \[0, 2\)"):
        EWGS(delta)


@pytest.mark.parametrize("amplitude", [-0.1, 0.2251])
def test_stableqat_that_would_turn_gradients_round(amplitude):
    with pytest.raises(lq.SpecError, match=rf"amplitude={amplitude} is not in \[0, 0\.2251\)"):
        StableQAT(amplitude)
