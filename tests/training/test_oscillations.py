"""Oscillations of weights and iterative freezing, against plain loops over single values."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import lq
from lq.quantizer.spec import QuantSpec
from lq.training.dampening import add_dampening
from lq.training.oscillations import OSCILLATING, OscillationTracker, check_thresholds, shares
from lq.training.quantized_weights import quantized_weights
from tests.training.oscillation_loops import Loop, integers

KINDS = {
    "symmetric": lambda: QuantSpec(3, signed=True),
    "one step": lambda: QuantSpec(3, signed=True, per_channel=False),
    "zero points": lambda: QuantSpec(3, symmetric=False),
    "1 bit": lambda: QuantSpec(1, signed=True),
    "1 to 4 bits": lambda: QuantSpec((2, 4, 1, 3), signed=True),
    "a wide and a pruned channel": lambda: QuantSpec((2, 8, 0, 3), signed=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind, layer=None, seed=0):
    """A layer with weights of that kind, quantized and calibrated."""
    torch.manual_seed(seed)
    model = nn.Sequential(layer or nn.Linear(5, 4))
    if kind == "zero points":
        model[0].weight.data.add_(0.3)
    return lq.attach(model, KINDS[kind](), None, first_last=None)


def parts(model):
    weight = model[0].parametrizations.weight
    return weight.original, weight[0]


def jump(weight, quantizer, seed):
    """Put every value to a level (a quarter of a step beside it) near zero, by chance."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-1, 2, weight.shape, generator=generator) + 0.2
    with torch.no_grad():
        weight.copy_(
            quantizer.layout.join(quantizer.layout.split(levels) * quantizer.layout.spread(quantizer.step, weight))
        )


@each_kind
@pytest.mark.parametrize("layer", ["linear", "transposed"])
def test_counts_and_freezes_as_loops_do(kind, layer):
    made = nn.ConvTranspose2d(4, 4, 2, groups=2) if layer == "transposed" else None
    model = layer_of(kind, made)
    weight, quantizer = parts(model)
    tracker = OscillationTracker(quantized_weights(model), momentum=0.2, max_bits=4)
    loops = [None if q is None else Loop(q, 0.2) for q in integers(weight, quantizer)]
    history = []
    for step in range(30):
        threshold = 0.7 - 0.005 * step
        jump(weight, quantizer, step)
        with torch.no_grad():
            quantizer.log2_step.sub_(0.01)  # learned meanwhile
        before = quantizer.layout.rows(weight.detach()).flatten().tolist()
        for loop, integer in zip(loops, integers(weight, quantizer), strict=True):
            if loop is not None:
                loop.step(integer, threshold)
        tracker.step(threshold)
        (state,) = tracker.state().values()
        rows = {key: quantizer.layout.rows(part).flatten().tolist() for key, part in state.items()}
        now = quantizer.layout.rows(weight.detach()).flatten().tolist()
        steps = (
            quantizer.layout.rows(
                quantizer.layout.join(
                    quantizer.layout.spread(quantizer.step.detach(), weight).expand(
                        quantizer.layout.split(weight).shape
                    )
                )
            )
            .flatten()
            .tolist()
        )
        offset = 0.5 if kind == "1 bit" else 0.0
        for i, loop in enumerate(loops):
            if loop is None:
                assert not rows["frozen"][i] and now[i] == before[i]
                continue
            assert rows["integer"][i] == loop.integer and rows["direction"][i] == loop.direction
            assert rows["frozen"][i] == loop.frozen
            assert rows["frequency"][i] == pytest.approx(loop.frequency, abs=1e-6)
            assert rows["mean"][i] == pytest.approx(loop.mean, abs=1e-5)
            if not loop.frozen:
                assert now[i] == before[i]
            elif kind != "1 to 4 bits":
                assert now[i] == pytest.approx((loop.integer + offset) * steps[i], rel=1e-6)
        history.append(sum(loop is not None and loop.frozen for loop in loops))
        counted = [loop for loop in loops if loop is not None]
        oscillating, frozen = shares([tracker])
        assert frozen == pytest.approx(history[-1] / len(counted))
        often = sum(loop.frequency > OSCILLATING and not loop.frozen for loop in counted)
        assert oscillating == pytest.approx(often / len(counted))
    assert history[0] == 0 and history == sorted(history)
    assert any(0 < count < len(counted) for count in history)


@each_kind
def test_frozen_weights_are_rounded_to_their_integers(kind):
    """The forward, with whatever width, gives a level of the grid, and the frozen values do not move."""
    model = layer_of(kind)
    weight, quantizer = parts(model)
    tracker = OscillationTracker(quantized_weights(model), momentum=0.5)
    for step in range(8):
        jump(weight, quantizer, step)
        tracker.step(0.2)
    (state,) = tracker.state().values()
    frozen = state["frozen"]
    assert frozen.any()
    rounded = model[0].weight.detach()[frozen]
    torch.testing.assert_close(rounded, weight.detach()[frozen])
    with torch.no_grad():
        weight.add_(3.0)  # a step with a large gradient, or weight decay
        quantizer.log2_step.add_(0.5)
    tracker.step(1.0)
    torch.testing.assert_close(weight.detach()[frozen], rounded * math.sqrt(2))
    torch.testing.assert_close(model[0].weight.detach()[frozen], rounded * math.sqrt(2))
    assert not weight.detach()[~frozen].equal(rounded)


@pytest.mark.parametrize("estimator", ["lsq", "ewgs", "adaptive_ewgs", "stableqat"])
@pytest.mark.parametrize("kind", ["symmetric", "one step", "zero points", "1 to 4 bits"])
def test_steps_get_the_gradients_of_frozen_weights(kind, estimator):
    """As if frozen weights were integers times the step, by autograd; the others are as without freezing."""
    model = layer_of(kind)
    lq.set_estimator(model, estimator)
    weight, quantizer = parts(model)
    tracker = OscillationTracker(quantized_weights(model), momentum=0.5)
    for step in range(4):
        jump(weight, quantizer, step)
        tracker.step(0.3)
    (state,) = tracker.state().values()
    frozen = state["frozen"]
    assert frozen.any() and not frozen.all()
    target = torch.randn(weight.shape)

    def to_steps(grad):
        """What the quantizer gives its step for a gradient to what it has rounded."""
        one = copy.deepcopy(quantizer)
        one(weight.detach().requires_grad_()).backward(grad)
        return one.log2_step.grad

    grad = model[0].weight.detach() - target
    log2_step = quantizer.log2_step.detach().clone().requires_grad_()
    offset = quantizer.layout.spread(torch.where(quantizer.bits == 1, 0.5, 0.0), weight)
    held = (state["integer"] + offset) * quantizer.layout.spread(log2_step.exp2(), weight)
    held.backward(torch.where(frozen, grad, 0.0))
    high = torch.exp2(quantizer.bits) - 1 - quantizer.zero_point.detach()
    scale = 1 / (high.clamp(min=0.5) * (weight.numel() / max(quantizer.bits.numel(), 1))).sqrt()
    (model[0].weight - target).square().sum().div(2).backward()
    to_weights = weight.grad.clone()
    tracker.take_gradients(3.0)
    tracker.take_gradients(3.0)  # they are taken
    assert not weight.grad[frozen].any() and weight.grad[~frozen].equal(to_weights[~frozen])
    beyond = to_steps(torch.where(frozen & (to_weights == 0), grad, 0.0))  # LSQ has given these already
    added = quantizer.log2_step.grad - to_steps(grad) + beyond
    inside = log2_step.grad * scale - beyond
    torch.testing.assert_close(added - beyond, 3.0 * inside, rtol=1e-3, atol=1e-4)
    assert inside.any()


def test_goes_on_from_its_state():
    model = layer_of("symmetric")
    weight, quantizer = parts(model)
    tracker = OscillationTracker(quantized_weights(model), momentum=0.3)
    for step in range(6):
        jump(weight, quantizer, step)
        tracker.step(0.4)
    other = copy.deepcopy(model)
    resumed = OscillationTracker(quantized_weights(other), 0.3, 4, tracker.state())
    for step in range(6, 12):
        for one, its in ((model, tracker), (other, resumed)):
            jump(*parts(one), step)
            its.step(0.35)
    assert parts(model)[0].equal(parts(other)[0])
    (mine,), (theirs,) = tracker.state().values(), resumed.state().values()
    assert mine["frozen"].any() and all(mine[key].equal(theirs[key]) for key in mine)


def test_weights_that_something_else_has_changed_begin_anew():
    model = layer_of("symmetric")
    weight, quantizer = parts(model)
    tracker = OscillationTracker(quantized_weights(model), momentum=0.5)
    for step in range(6):
        jump(weight, quantizer, step)
        tracker.step(0.2)
    assert shares([tracker])[1] > 0
    with torch.no_grad():
        weight.neg_().add_(0.01)
    changed = weight.detach().clone()
    again = OscillationTracker(quantized_weights(model), 0.5, 4, tracker.state())
    again.hold()
    assert shares([again]) == (0.0, 0.0)
    assert weight.detach().equal(changed)


def test_many_weights_in_blocks(monkeypatch):
    model = nn.Sequential(*(nn.Linear(5, 4) for _ in range(6)))
    model = lq.attach(model, 3, None, first_last=None)
    other = copy.deepcopy(model)
    whole = OscillationTracker(quantized_weights(model), 0.3)
    monkeypatch.setattr("lq.training.oscillations._BLOCK", 45)
    split = OscillationTracker(quantized_weights(other), 0.3)
    assert len(whole._blocks) == 1 and len(split._blocks) == 3 and whole.count == split.count == 120
    for step in range(10):
        for one, tracker in ((model, whole), (other, split)):
            for layer in one:
                jump(layer.parametrizations.weight.original, layer.parametrizations.weight[0], step)
            tracker.step(0.4)
    assert shares([whole]) == shares([split]) and float(shares([whole])[1]) > 0
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_of_functions_are_held_in_their_parameter():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, y := x.flip(1), y)[0]

    x, model = torch.randn(2, 3, 8), SelfAttention()
    lq.attach(model, 3, None, structure=lq.inspect(model, x), first_last=None)
    lq.calibrate(model, [x])
    found = quantized_weights(model)
    parameter = model.attention.in_proj_weight
    queries, others = (w for w in found if w.parameter is parameter)
    assert {queries.numel, others.numel} == {64, 128} and {len(queries.values), len(others.values)} == {8, 16}
    tracker, before = OscillationTracker([queries], 0.5), others.values.clone()
    for sign in (1, -1, 1, -1):
        with torch.no_grad():
            queries.values.fill_(sign * 0.7).mul_(queries.step)
        tracker.step(0.2)
    (state,) = tracker.state().values()
    assert state["frozen"].all() and others.values.equal(before)
    with torch.no_grad():
        parameter.add_(5.0)
    tracker.hold()
    torch.testing.assert_close(queries.values, state["integer"] * queries.step)
    assert others.values.equal(before + 5.0)
    others.values.sub_(5.0)
    model(x).square().sum().backward()
    assert parameter.grad.any()
    tracker.take_gradients()
    assert not queries.grad.any() and others.grad.any()


def test_bfloat16_weights():
    model = layer_of("symmetric").to(torch.bfloat16)
    weight, quantizer = parts(model)
    tracker = OscillationTracker(quantized_weights(model), momentum=0.5)
    for step in range(6):
        jump(weight, quantizer, step)
        tracker.step(0.2)
    (state,) = tracker.state().values()
    frozen = state["frozen"]
    assert frozen.any() and weight.dtype == torch.bfloat16
    levels = (quantizer(weight.float()) / quantizer.layout.spread(quantizer.step, weight)).round()
    assert levels[frozen].equal(state["integer"][frozen].float())


def test_no_number_is_waited_for():
    """On the meta device tensors have no numbers: whoever looks at one fails."""
    model = layer_of("1 to 4 bits")
    lq.set_estimator(model, "lsq")
    tracker = OscillationTracker(quantized_weights(model))
    (block,) = tracker._blocks
    (weight,) = block.weights
    parameter = nn.Parameter(weight.parameter.to("meta"))
    parameter.grad = torch.empty_like(parameter)
    block.weights = [dataclasses.replace(weight, parameter=parameter, quantizer=weight.quantizer.to("meta"))]
    weight.quantizer.log2_step.grad = torch.empty(4, device="meta")
    for key in ("integer", "direction", "frequency", "mean", "frozen"):
        setattr(block, key, getattr(block, key).to("meta"))
    for _ in range(2):
        tracker.take_gradients()
        tracker.step(0.1)
        shares([tracker])
    assert not block._none_frozen
    add_dampening(block.weights, 0.1)
    with pytest.raises(RuntimeError, match="meta"):
        bool(block.frozen.any())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: OscillationTracker([], momentum=0.0), "momentum=0.0 is no weight of a running mean"),
        (lambda: OscillationTracker([], max_bits=9), "max_bits=9 is not a width of weights that oscillate"),
        (lambda: check_thresholds(0.0, 0.1), "start=0.0 is no frequency"),
        (lambda: check_thresholds(0.1, 2.0), "end=2.0 is no frequency"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(lq.SpecError, match=text):
        call()


def test_nothing_to_look_at():
    model = lq.attach(nn.Sequential(nn.Linear(5, 4)), 8, None)
    tracker = OscillationTracker(quantized_weights(model))
    tracker.step(0.1)
    assert shares([tracker]) == (0.0, 0.0) and tracker.state() == {}
