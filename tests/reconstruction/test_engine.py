"""The loop that fits a unit: what it optimizes, what it moves, what it leaves."""

import math
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.sites import float_weight, weight_quantizer
from lq.errors import DivergenceError
from lq.reconstruction import Constant, LpLoss
from lq.reconstruction.engine import _order
from lq.reconstruction.quantizers import tapped
from lq.reconstruction.rounding import AdaRound, AnnealingSoftmax, Nearest
from tests.helpers import assert_same
from tests.reconstruction.fitting import FAST, Unit, activations_of, check_written, method
from tests.reconstruction.networks import Basic, quantized, samples

ROUNDINGS = {"nearest": Nearest(), "adaround": FAST, "softmax": AnnealingSoftmax((-1, 0, 1, 2), lr=0.05)}


@pytest.mark.parametrize("activations", ["learned", "quantized", "float"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_losses_are_those_of_the_model_as_it_is(rounding, activations):
    unit = Unit()
    before = unit.loss()
    with torch.no_grad():
        found = unit.fit(method(rounding=ROUNDINGS[rounding], activation_mode=activations, iterations=40, step_lr=0.02))
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(unit.loss(), rel=1e-4)
    assert found.after < found.before or (rounding == "nearest" and activations != "learned")
    nothing = rounding == "nearest" and activations != "learned"  # is learned
    assert found.iterations == 40 * (not nothing) and len(found.curve) == (0 if nothing else 40)
    check_written(unit.model)


def test_what_each_kind_of_activations_moves():
    moved = {}
    for activations in ("learned", "quantized", "float"):
        unit = Unit()
        before, weights = unit.steps(), unit.weights()
        unit.fit(method(activation_mode=activations, iterations=40, step_lr=0.02))
        after = unit.steps()
        moved[activations] = [name for name in before if before[name] != after[name]]
        assert all(before[name][1] == after[name][1] for name in before)  # zero points are fixed
        assert any(not torch.equal(weights[n], w) for n, w in unit.weights().items())
        assert all(not p.requires_grad for p in unit.model.parameters())
    assert moved == {"learned": ["2.input", "4.input"], "quantized": [], "float": []}


@pytest.mark.parametrize("activations", ["float", "quantized", "learned"])
def test_what_a_step_sees_of_activations(activations):
    """Float ones let tensors pass; the others round, as the model does."""
    unit, outputs = Unit(), []

    def loss(output, target, weights):
        outputs.append(output.detach().clone())
        return LpLoss()(output, target)

    with ExitStack() as stack:
        if activations == "float":
            for part in activations_of(unit.model).values():
                stack.enter_context(tapped(part, lambda x: x))
        expected = unit.model(unit.x)[_order(24, 1, 24, 0)[0]]
    unit.fit(
        method(rounding=Nearest(), activation_mode=activations, iterations=1, batch_size=24, loss=loss, bias_lr=1e-9)
    )
    assert len(outputs) == 3  # before, in the step, after
    torch.testing.assert_close(outputs[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["adaround", "softmax"])
def test_hard_and_soft_agree_at_the_end(rounding):
    """The output of the last steps is that of the model that is written."""
    outputs = []

    def loss(output, target, weights):
        outputs.append(output.detach().clone())
        return LpLoss()(output, target)

    rule = {"adaround": AdaRound(penalty=0.1, lr=0.05), "softmax": AnnealingSoftmax(lr=0.05)}[rounding]
    unit = Unit(activations=8)
    unit.fit(method(rounding=rule, iterations=300, batch_size=24, activation_mode="quantized", loss=loss))
    order = _order(24, 300, 24, 0)[-1]
    hard = unit.model(unit.x)[order]
    soft = outputs[-2]  # then comes the loss over all samples
    scale = (outputs[1] - hard).abs().mean()
    assert soft.shape == hard.shape
    assert (soft - hard).abs().mean() < 0.1 * scale


def test_a_step_is_adams_on_the_loss_by_hand():
    """Four steps on a linear layer, its weight and its input rounded, in float64."""
    unit = Unit(nn.Sequential(nn.Linear(8, 3)), weights=3, count=8, overrides={"0": {"activations": 4}})
    layer = unit.model[0]
    quantizer, weight, part = weight_quantizer(layer), float_weight(layer).clone(), layer.input_quantizer
    step = quantizer.step.double()[:, None]
    low, high = -quantizer.zero_point.double()[:, None], 2**3 - 1 - quantizer.zero_point.double()[:, None]
    floor = (weight.double() / step).floor()
    v = torch.logit((weight.double() / step - floor + 0.1) / 1.2).requires_grad_()
    log2_step = part.log2_step.detach().double().clone().requires_grad_()
    x_low, x_high = -part.zero_point.double(), 2**4 - 1 - part.zero_point.double()
    optimizer = torch.optim.Adam([{"params": [v], "lr": 0.05}, {"params": [log2_step], "lr": 0.02}])
    x, target = unit.x.double(), unit.targets.batch(slice(0, 8)).double()
    expected = []
    for iteration in range(4):
        s = torch.exp2(log2_step)
        levels = x / s
        whole = levels.detach().round()
        passing = torch.where((levels > x_low) & (levels < x_high), levels - levels.detach(), 0.0)
        rounded = (torch.maximum(torch.minimum(whole, x_high), x_low) + passing) * s
        h = (1.2 * v.sigmoid() - 0.1).clamp(0, 1)
        w = torch.maximum(torch.minimum(floor + h, high), low) * step
        loss = (F.linear(rounded, w, layer.bias.double()) - target).square().sum(1).mean()
        expected.append(loss.item())
        exponent = 20 - 18 * (iteration / 4 - 0.2) / 0.8
        penalty = 0.01 * (1 - (2 * h - 1).abs() ** exponent).sum() if iteration / 4 >= 0.2 else 0
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.param_groups[1]["lr"] = 0.02 * (1 + math.cos(math.pi * iteration / 4)) / 2
        optimizer.step()
    found = unit.fit(method(iterations=4, step_lr=0.02))
    assert found.curve == pytest.approx(expected, rel=1e-4)
    assert found.after < found.before
    assert part.log2_step.item() == pytest.approx(log2_step.item(), abs=1e-5)
    levels = torch.maximum(torch.minimum(floor + (v >= 0), high), low)
    torch.testing.assert_close(float_weight(layer), (levels * step).float(), rtol=1e-6, atol=0)


# --- inputs and drops -------------------------------------------------------------------------------------------------


def shifted(stored, storage):
    return storage.keep(stored.whole() + 100)


@pytest.mark.parametrize(("probability", "kind"), [(0.0, "quantized"), (1.0, "float"), (0.5, "both")])
def test_the_share_of_float_inputs(probability, kind):
    unit = Unit(nn.Sequential(nn.Identity(), nn.Linear(8, 3)), activations=None, inputs=shifted)
    taken = []
    handle = unit.model[0].register_forward_pre_hook(lambda m, args: taken.append(args[0].detach().clone()))
    unit.fit(method(drop=Constant(probability), iterations=30))
    handle.remove()
    steps = torch.stack([t for t in taken if len(t) == 8][3:-3])  # without the losses before and after
    share = (steps < 50).float().mean().item()
    assert share == pytest.approx({"quantized": 0, "float": 1, "both": 0.5}[kind], abs=0.05)
    rows = set(map(tuple, torch.cat([unit.x, unit.x + 100]).round(decimals=3).tolist()))
    whole = [tuple(row) in rows for row in steps.flatten(0, 1).round(decimals=3).tolist()]
    assert all(whole) == (kind != "both")  # elementwise, not by sample


def test_drops_hold_for_every_activation_and_follow_the_schedule():
    unit, shares = Unit(activations=2), []
    part = unit.model[2].input_quantizer
    relu = unit.model[1]
    inside, outside = [], []
    relu.register_forward_hook(lambda m, a, out: inside.append(out.detach().clone()))
    unit.model[2].register_forward_pre_hook(lambda m, args: outside.append(args[0].detach().clone()))
    unit.fit(method(drop=lambda done: 1 - done, iterations=40, step_lr=1e-12, rounding=Nearest()))
    for x, y in zip(inside, outside, strict=True):
        off = (x - x.div(part.step).round().clamp(0, 3).mul(part.step)).abs() > 1e-4
        shares.append(((x == y) & off).float().sum().item() / max(1.0, off.float().sum().item()))
    assert shares[:3] == [0.0] * 3 and shares[-3:] == [0.0] * 3
    steps = shares[3:-3]
    assert len(steps) == 40 and steps[0] == 1.0
    assert sum(steps[:10]) / 10 > 0.75 and sum(steps[-10:]) / 10 < 0.25


def test_the_order_of_samples():
    order = _order(10, 7, 4, 3)
    assert order.shape == (7, 4)
    flat = order.flatten().tolist()
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert torch.equal(order, _order(10, 7, 4, 3)) and not torch.equal(order, _order(10, 7, 4, 4))
    assert _order(3, 2, 8, 0).shape == (2, 8)  # more than there are: some come twice


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_unit_that_got_worse_keeps_nearest_rounding_and_its_steps():
    unit = Unit()
    before, steps = {n: m.weight.clone() for n, m in unit.model.named_modules() if weight_quantizer(m)}, unit.steps()

    def away(output, target, weights):
        return LpLoss()(output, target) * (-1 if torch.is_grad_enabled() else 1)

    found = unit.fit(method(loss=away, iterations=30, step_lr=0.05))
    assert found.after == found.before
    assert unit.steps() == steps
    check_written(unit.model)
    for name, weight in before.items():
        assert torch.equal(float_weight(unit.model.get_submodule(name)), weight)


def test_a_loss_that_is_no_number():
    unit = Unit()
    before = {key: value.clone() for key, value in unit.model.state_dict().items()}

    def loss(output, target, weights):
        return LpLoss()(output, target) * (torch.nan if torch.is_grad_enabled() else 1)

    with pytest.raises(DivergenceError, match=r"reconstruction diverged: .* the loss is nan, it was .*; lower step_lr"):
        unit.fit(method(loss=loss, iterations=3))
    assert all(value.isfinite().all() for value in unit.model.state_dict().values())
    assert list(unit.model.state_dict()) == list(before)


@pytest.mark.parametrize("early_stop", [False, True])
def test_early_stop_ends_when_nothing_falls_any_more(early_stop):
    unit = Unit(activations=8)
    rule = AnnealingSoftmax(temperature=(1.0, 1e-8), lr=1e-9)  # decided before the middle
    found = unit.fit(method(rounding=rule, iterations=200, early_stop=early_stop, activation_mode="quantized"))
    assert (found.iterations < 200) == early_stop
    assert len(found.curve) == max(1, found.iterations // 2)
    assert all(math.isfinite(point) and point > 0 for point in found.curve)
    check_written(unit.model)


def test_early_stop_goes_on_while_the_rounding_is_open():
    unit = Unit(activations=8)
    rule = AdaRound(penalty=0.0, lr=1e-6)
    assert (
        unit.fit(method(rounding=rule, iterations=100, early_stop=True, activation_mode="quantized")).iterations == 100
    )


def test_progress_wraps_the_steps():
    unit, seen = Unit(), []

    def watch(steps, name):
        assert name == "unit"
        for step in steps:
            seen.append(step)
            yield step

    unit.fit(method(iterations=5, watch=watch))
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fails", [False, True])
def test_taps_hooks_and_random_states_are_left_as_they_were(fails):
    unit = Unit()
    own = lambda x: x  # noqa: E731
    weight_quantizer(unit.model[0]).tap = own
    state = torch.get_rng_state()

    def loss(output, target, weights):
        if fails and torch.is_grad_enabled():
            raise KeyError("inside")
        return LpLoss()(output, target)

    fitting = method(loss=loss, iterations=3, drop=Constant(0.5))
    if fails:
        with pytest.raises(KeyError, match="inside"):
            unit.fit(fitting)
    else:
        unit.fit(fitting)
    assert torch.equal(torch.get_rng_state(), state)
    taps = [part.tap for part in unit.model.modules() if hasattr(part, "tap")]
    assert taps.count(own) == 1 and taps.count(None) == len(taps) - 1
    assert unit.model[0]._forward_hooks == {}


def test_the_same_seed_gives_the_same_unit():
    found = []
    for seed in (0, 0, 1):
        unit = Unit()
        fitted = unit.fit(method(drop=Constant(0.5), step_lr=0.02), seed=seed)
        found.append((fitted.curve, fitted.after, dict(unit.model.state_dict())))
    assert_same(found[0], found[1])
    assert found[0][0] != found[2][0]


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_the_estimator_makes_no_difference(estimator):
    unit = Unit(estimator=estimator)
    found = unit.fit(method(iterations=10, step_lr=0.02))
    other = Unit()
    assert other.fit(method(iterations=10, step_lr=0.02)).curve == found.curve


WIDTHS = {
    "transposed, in groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1)),
        (4, 4, 4),
        {"0": [0, 1, 2, 3, 4, 8], "2": 1},
    ),
    "a residual block": (lambda: Basic(4, 4), (4, 4, 4), {"conv1": [0, 1, 2, 3], "conv2": 1}),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rounding", ["adaround", "softmax"])
@pytest.mark.parametrize("kind", WIDTHS)
def test_widths_for_each_channel_are_kept(kind, rounding, symmetric):
    make, shape, widths = WIDTHS[kind]
    torch.manual_seed(0)
    model, data = make().eval(), [samples(shape, 8)]
    quantized(model, data, 4, 4, symmetric=symmetric)
    lq.set_bits(model, widths)
    before = {n: q.bits.clone() for n, m in model.named_modules() if (q := weight_quantizer(m)) is not None}
    lq.reconstruct(model, data, units="layer", rounding=ROUNDINGS[rounding], iterations=10, batch_size=8)
    check_written(model)
    for name, bits in before.items():
        layer = model.get_submodule(name)
        assert torch.equal(weight_quantizer(layer).bits, bits)
        weight = float_weight(layer).detach()
        rows = (
            weight.unflatten(0, (2, -1)).transpose(1, 2).reshape(6, -1) if "trans" in kind and name == "0" else weight
        )
        for row, width in zip(rows, bits.expand(len(rows)), strict=True):
            assert row.unique().numel() <= 2 ** int(width)
            assert width > 0 or not row.any()
            if width == 1 and symmetric:
                assert row.unique().numel() == 2 and row.sum() == pytest.approx(row.numel() * row.mean().item())
                assert torch.equal(row.abs(), row.abs().flatten()[0].expand_as(row))
