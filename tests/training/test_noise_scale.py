"""Learned widths: targets, penalty, coordinates, ceilings and how they become integers, each against a plain oracle."""

import math

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.quantizer.estimators import NoiseScale
from lq.quantizer.levels import middle
from lq.training.noise_scale import Penalty, WidthLearner, target_widths
from lq.training.width_goals import SizeBudget, Targets

NAMES = ["0.weight", "2.weight", "2.input", "4.weight", "4.input"]


def network(bits=8, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    lq.attach(model, bits, bits, **kwargs)
    lq.calibrate(model, [batch()])
    lq.set_estimator(model, NoiseScale(widths=True))
    return model.train()


def batch(seed=1):
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))


def learner(model, **targets):
    return WidthLearner(list(quantizers(model)), targets or target_widths(model, 4, 4))


# --- targets --------------------------------------------------------------------------------------------------------


def test_targets_spare_the_first_and_last_layers():
    found = target_widths(network(), 3, 4)
    assert found == {"0.weight": 8, "2.weight": 3, "2.input": 4, "4.weight": 8, "4.input": 8}
    assert target_widths(network(), 3, 4, first_last=None) == dict(zip(NAMES, [3, 3, 4, 3, 4], strict=True))
    assert target_widths(network(), None, 4) == {"2.input": 4, "4.input": 8}


def test_pins_by_layer_and_by_site():
    found = target_widths(network(), 3, 4, pins={"2": 5, "4.input": 6})
    assert found == {"0.weight": 8, "2.weight": 5, "2.input": 5, "4.weight": 8, "4.input": 6}
    with pytest.raises(lq.PatternError, match="pins"):
        target_widths(network(), 3, 4, pins={"7": 5})
    with pytest.raises(lq.SpecError, match="bits=9 is not a width"):
        target_widths(network(), 9, 4)


# --- penalty --------------------------------------------------------------------------------------------------------


def test_penalty_grows_after_the_warmup_times_the_mean_loss():
    penalty = Penalty(0.1, warmup=2)
    losses, factors = [2.0, 4.0, float("nan"), 3.0], []
    for loss in losses:
        penalty.take(torch.tensor(loss))
        factors.append(float(penalty.factor()))
    mean = 2.0
    expected = [0.0]
    mean += (4.0 - mean) / 2
    expected.append(0.0)
    expected.append(0.1 * 1 * mean)  # a loss that is no number does not count
    mean += (3.0 - mean) / 4
    expected.append(0.1 * 2 * mean)
    assert factors == pytest.approx(expected)


def test_gradient_of_the_excess_is_weighed_by_the_violated_share():
    target = torch.tensor([4.0, 4.0, 4.0, 4.0, float("nan")])
    is_weight = torch.tensor([True, True, True, False, False])
    aim = Targets(target, is_weight, torch.full((5,), 8.0))
    bits = torch.tensor([5.0, 4.5, 3.0, 6.0, 9.0])
    # two of three weights and the only activation with a target are above it: three violated
    weights, activations = (2 + 1e-3) / (3 + 1e-3) / 3, (1 + 1e-3) / (3 + 1e-3) / 2
    torch.testing.assert_close(aim.gradient(bits), torch.tensor([weights, weights, 0.0, activations, 0.0]))
    assert not aim.met(bits)
    assert aim.met(torch.tensor([4.0, 4.0, 3.0, 4.0, 9.0]))


def test_ceiling_falls_from_the_start_to_the_targets():
    aim = Targets(
        torch.tensor([2.0, 4.0, float("nan")]), torch.ones(3, dtype=torch.bool), torch.tensor([8.0, 4.0, 8.0])
    )
    bits = torch.full((3,), 9.0)
    assert aim.project(0.0, bits).tolist() == [8.0, 4.0, 9.0]
    assert aim.project(0.5, bits).tolist() == [3.5, 4.0, 9.0]
    assert aim.project(1.0, bits).tolist() == [2.0, 4.0, 9.0]
    assert aim.project(0.0, bits - 8).tolist() == [1.0, 1.0, 1.0]


# --- coordinates ----------------------------------------------------------------------------------------------------


def test_gradients_are_those_to_step_and_range():
    model = network(6, first_last=None)
    found = learner(model, **{"0.weight": 2.0})
    model(batch()).square().sum().backward()
    parts = {
        name: torch.cat([getattr(q, name).grad.reshape(-1) for q in quantizers(model)])
        for name in ("log2_step", "bits")
    }
    found.gather(torch.zeros_like(found.bits))
    plain = ~found.learns_zero
    torch.testing.assert_close(found.log2_range.grad[plain], parts["bits"][plain])
    torch.testing.assert_close(found.log2_step.grad[plain], (parts["log2_step"] - parts["bits"])[plain])
    assert found.learns_zero.any() and parts["bits"].any()


def test_a_width_at_its_target_moves_step_and_range_as_one():
    model = network(4, first_last=None)
    found = learner(model, **dict.fromkeys(NAMES, 4.0))
    model(batch()).square().sum().backward()
    steps = torch.cat([q.log2_step.grad.reshape(-1) for q in quantizers(model)])
    found.gather(torch.ones_like(found.bits))
    assert torch.equal(found.log2_step.grad, steps) and torch.equal(found.log2_range.grad, steps)


def test_what_is_written_is_what_is_read():
    model = network()
    found = learner(model)
    before = {q.name: [p.detach().clone() for p in q.parameters()] for q in quantizers(model)}
    found.write()
    for quantizer in quantizers(model):
        for mine, theirs in zip(quantizer.parameters(), before[quantizer.name], strict=True):
            torch.testing.assert_close(mine.detach(), theirs, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        found.log2_range.add_(0.5)
    found.write()
    for quantizer in quantizers(model):
        torch.testing.assert_close(quantizer.bits.detach(), torch.full_like(quantizer.bits, 8.5))
        assert torch.equal(quantizer.log2_step, before[quantizer.name][0])
        if not quantizer.learns_offset and not quantizer.is_unsigned:
            torch.testing.assert_close(quantizer.zero_point.detach(), middle(quantizer.bits.detach()))


def test_what_the_ceiling_falls_by_is_noise_and_what_moved_beyond_it_is_shared():
    model = network(6, first_last=None)
    found = learner(model, **dict.fromkeys(NAMES, 2.0))
    step, reach = found.log2_step.detach().clone(), found.log2_range.detach().clone()
    found.hold(torch.full_like(step, 6.0), torch.full_like(step, 5.0))
    torch.testing.assert_close(found.log2_step.detach(), step + 1)
    assert torch.equal(found.log2_range, reach)
    with torch.no_grad():
        found.log2_range.add_(0.4)
    found.hold(torch.full_like(step, 5.0), torch.full_like(step, 5.0))
    torch.testing.assert_close(found.log2_range.detach(), reach + 0.2)
    torch.testing.assert_close(found.log2_step.detach(), step + 1.2)


def test_a_channel_without_bits_is_pruned_for_good():
    model = network(4, first_last=None)
    found = learner(model, **{"2.input": 4.0})
    with torch.no_grad():
        found.log2_range[0] -= 3.6
        found.log2_range[-1] -= 3.9  # an activation: never less than a bit
    found.hold(found.bits, found.bits)
    assert found.bits[0] == 0 and found.pruned.tolist()[:2] == [True, False]
    assert found.bits[-1] == 1
    found.write()
    assert not model[0].weight[0].any() and model[0].weight[1].any()
    model(batch()).square().sum().backward()
    found.gather(torch.zeros_like(found.bits))
    assert found.log2_step.grad[0] == 0 and found.log2_range.grad[0] == 0
    with torch.no_grad():
        found.log2_range.add_(3.0)
    found.hold(found.bits, found.bits)
    assert found.bits[0] == 0
    found.settle(Targets(found.target, found.is_weight, found.start).integers(found.bits))
    assert next(iter(quantizers(model))).bits[0] == 0


def test_settled_widths_are_integers_and_keep_their_ranges():
    model = network(4, first_last=None)
    found = learner(model, **{"2.input": 4.0})
    with torch.no_grad():
        found.log2_step.add_(torch.linspace(0, 2.2, len(found.bits)))
    aim = Targets(found.target, found.is_weight, found.start)
    bits = found.bits
    wanted = torch.tensor([max(math.ceil(b - 0.1), 1) for b in bits.tolist()], dtype=torch.float32)
    span = (torch.exp2(bits) - 1) * found.log2_step.detach().exp2()
    found.settle(aim.integers(bits))
    now = torch.cat([q.bits.detach().reshape(-1) for q in quantizers(model)])
    assert torch.equal(now, wanted)
    steps = torch.cat([q.step.detach().reshape(-1) for q in quantizers(model)])
    torch.testing.assert_close((torch.exp2(now) - 1) * steps, span)
    torch.testing.assert_close(found.bits, now)


def test_without_a_range_there_is_nothing_to_start_from():
    model = lq.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 4, 4)
    with pytest.raises(lq.SpecError, match="has no range to start from; run lq.calibrate"):
        WidthLearner(list(quantizers(model)), {})


# --- a budget -------------------------------------------------------------------------------------------------------


def budget(limit, start=(8.0, 8.0, 8.0, 8.0)):
    start = torch.tensor(start)
    others = Targets(torch.full((4,), float("nan")), torch.tensor([True, True, True, False]), start)
    return SizeBudget(torch.tensor([0.5, 0.25, 0.25, 0.0]), limit, others, start)


def test_budget_counts_and_pulls_by_size():
    aim = budget(3.0)
    bits = torch.tensor([4.0, 2.0, 3.0, 8.0])
    assert aim.total(bits) == pytest.approx(3.25)
    assert not aim.met(bits) and aim.met(bits - 0.3)
    pull = aim.gradient(bits)
    assert pull[3] == 0 and float(pull[0]) == pytest.approx(2 * float(pull[1])) and pull[0] > 0
    assert not aim.gradient(bits - 0.3).any()


def test_budget_is_kept_by_moving_all_alike_within_0_and_8_bits():
    aim = budget(3.0)
    held = aim.project(1.0, torch.tensor([8.0, 6.0, 4.0, 5.0]))
    assert aim.total(held) == pytest.approx(3.0) and held[3] == 5
    assert (held[0] - held[1]).item() == pytest.approx(2.0) and (held[1] - held[2]).item() == pytest.approx(2.0)
    held = budget(1.0).project(1.0, torch.tensor([4.0, 1.0, 1.0, 5.0]))
    assert held.tolist() == pytest.approx([2.0, 0.0, 0.0, 5.0], abs=1e-5)
    held = budget(5.0).project(1.0, torch.tensor([2.0, 7.0, 0.0, 5.0]))  # up; what is pruned stays so
    assert held.tolist() == pytest.approx([6.0, 8.0, 0.0, 5.0], abs=1e-4)
    assert budget(3.0).project(0.0, torch.full((4,), 8.0)).tolist() == [8.0] * 4
    assert budget(2.0).project(0.5, torch.full((4,), 8.0)).tolist() == pytest.approx([3.5, 3.5, 3.5, 8.0])


@pytest.mark.parametrize("seed", range(20))
def test_integers_keep_to_the_budget_and_use_it(seed):
    generator = torch.Generator().manual_seed(seed)
    count = 40
    sizes = torch.randint(1, 30, (count,), generator=generator).float()
    costs = sizes / sizes.sum()
    start = torch.full((count,), 8.0)
    others = Targets(torch.full((count,), float("nan")), torch.ones(count, dtype=torch.bool), start)
    aim = SizeBudget(costs, 3.0, others, start)
    bits = aim.project(1.0, torch.rand(count, generator=generator) * 6)
    whole = aim.integers(bits)
    assert torch.equal(whole, whole.round()) and (whole >= 0).all()
    assert aim.total(whole) <= 3.0 + 1e-5
    assert ((whole - bits).abs() < 1).all()
    assert aim.total(whole) > 3.0 - 3 * float(costs.max())
