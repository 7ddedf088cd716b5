"""Loss-aware ranges against hand loops, brute force and losses whose best ranges are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.attachment.sites import activation_quantizers, quantizers, weight_quantizer
from lq.calibration.calibration import calibrate_weights
from lq.calibration.loss_aware import POWERS, best_of_parabola, optimize_ranges
from lq.errors import DataError, NoEffectWarning, SpecError, StateError
from lq.quantizer.ranges import Lp
from lq.structure.outputs import kl_divergence
from tests.helpers import steps


def data(batches=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)) for _ in range(batches)
    ]


def network(weights=3, activations=3, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[4].weight.mul_(20)  # sure of some classes
    lq.attach(model, weights, activations, **{"first_last": None, **kwargs})
    return lq.calibrate(model, data())


@torch.no_grad()
def kl(model):
    """The KL divergence to the float model, of all samples together."""
    x = torch.cat([x for x, _ in data()])
    return float(kl_divergence(model.eval()(x), float_copy(model)(x)))


def ranges(model):
    return [(q.log2_step.detach().clone(), q.zero_point.detach().clone()) for q in quantizers(model)]


def same(left, right):
    flat = ([part for pair in side for part in pair] for side in (left, right))
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


def with_rule(p):
    """The network with the ranges of the rule of that exponent, all its quantizers' own."""
    model = network()
    for quantizer in quantizers(model):
        quantizer.spec = replace(quantizer.spec, range=Lp(p=p))
    calibrate_weights(model)
    for site in activation_quantizers(model).values():
        site.refit()
    return model


# --- exponents ------------------------------------------------------------------------------------------------------


def test_exponents_are_those_of_the_paper():
    np.testing.assert_allclose(POWERS, np.linspace(2, 4, 10))


def test_the_sweep_is_a_loop_over_rules():
    model = network()
    found = optimize_ranges(model, data(), evaluations=0)
    assert found.powers[:10] == POWERS
    expected = [kl(with_rule(p)) for p in found.powers]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    np.testing.assert_allclose(found.before, kl(network()), rtol=1e-4)
    assert found.power == found.powers[np.argmin(expected)]
    assert same(ranges(model), ranges(with_rule(found.power)))
    assert found.after == found.start == min(found.losses)
    assert found.evaluations == 1 + len(found.powers)


def step_of(model):
    return float(next(q for q in quantizers(model) if q.name == "0.weight").log2_step.mean())


@pytest.mark.parametrize(("sign", "last"), [(1, True), (-1, False)])
def test_the_parabola_counts_only_if_it_is_convex(sign, last):
    """A loss that is a parabola of the exponent, told by the range it leads to."""
    fitted = {p: step_of(with_rule(p)) for p in (*POWERS, 2.75)}
    assert len(set(fitted.values())) > 5
    known, centre = network(), 2.75

    def loss(output, batch):
        p = min(fitted, key=lambda p: abs(fitted[p] - step_of(known)))
        return torch.tensor(sign * (p - centre) ** 2)

    found = optimize_ranges(known, data(1), loss=loss, evaluations=0)
    assert (len(found.powers) == 11) is last
    assert found.power in found.powers
    if last:
        assert 2 < found.powers[-1] < 4


def test_the_least_of_a_parabola():
    x = [2.0, 2.5, 3.0, 3.5, 4.0]
    assert best_of_parabola(x, [3 * (v - 2.7) ** 2 + 1 for v in x]) == pytest.approx(2.7)
    for wrong in ([-((v - 2.7) ** 2) for v in x], [(v - 1.9) ** 2 for v in x], [(v - 4.1) ** 2 for v in x]):
        assert best_of_parabola(x, wrong) is None
    assert best_of_parabola(x, [1.0] * 5) is None
    assert best_of_parabola(x, x) is None
    assert best_of_parabola(x, [math.inf, 1.0, 0.0, 1.0, 2.0]) is None
    assert best_of_parabola([2.0, 3.0], [1.0, 0.0]) is None


def test_one_exponent_is_enough():
    found = optimize_ranges(network(), data(), powers=(2.0,), evaluations=0)
    assert found.powers == (2.0,)


def test_better_ranges_than_all_tried_are_kept():
    model = network()
    optimize_ranges(model, data(), evaluations=300)
    known = ranges(model)
    again = optimize_ranges(model, data(), evaluations=0)
    assert again.power is None
    assert again.after == again.before < min(again.losses)
    assert same(ranges(model), known)
    assert "with the ranges given" in str(again)


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("site", ["weight", "activation"])
def test_one_range_against_brute_force(bits, site):
    """KL over one range: the search comes near the best factor of a fine grid."""
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    spec = lq.QuantSpec(bits, per_channel=site == "weight", range=Lp(p=2.0))
    chosen = (spec, None) if site == "weight" else (None, spec)
    lq.attach(model, *chosen, include="0" if site == "weight" else None, first_last=None)
    lq.calibrate(model, data())
    (quantizer,) = quantizers(model)
    begin, losses = quantizer.log2_step.detach().clone(), []
    found = optimize_ranges(model, data(), powers=(2.0,))
    assert kl(model) == pytest.approx(found.after, rel=1e-4)
    for factor in np.linspace(-1, 0.6, 161):
        with torch.no_grad():
            quantizer.log2_step.copy_(begin + factor)
        losses.append(kl(model))
    assert found.after <= found.start == found.before
    assert found.after <= 1.15 * min(losses)


def test_the_search_finds_known_factors():
    """The loss is least where every step is 2**0.4 times that of the start."""
    model = with_rule(2.0)
    origin = steps(model)

    def loss(output, batch):
        return sum((now - start - 0.4).square().mean() for now, start in zip(steps(model), origin, strict=True))

    optimize_ranges(model, data(1), loss=loss, powers=(2.0,), evaluations=1000)
    for now, start in zip(steps(model), origin, strict=True):
        torch.testing.assert_close(now - start, torch.full_like(start, 0.4), atol=0.06, rtol=0)


@pytest.mark.parametrize("evaluations", [0, 1, 7, 60, 300])
def test_never_worse_than_the_start_and_within_the_evaluations(evaluations):
    model = network(2, 2)
    found = optimize_ranges(model, data(), evaluations=evaluations)
    assert found.after <= found.start <= found.before
    assert found.evaluations <= 12 + evaluations
    assert kl(model) == pytest.approx(found.after, rel=1e-4)
    assert f"{found.evaluations} evaluations" in str(found)


def test_it_is_much_better_at_few_bits():
    model = network(2, 2)
    found = optimize_ranges(model, data())
    assert found.after < 0.6 * found.before


def test_two_runs_are_the_same():
    first, second = network(2, 3), network(2, 3)
    left = optimize_ranges(first, data(), evaluations=100)
    torch.manual_seed(7)
    right = optimize_ranges(second, data(), evaluations=100)
    assert left == right
    assert same(ranges(first), ranges(second))


def test_a_loss_that_is_never_lower_moves_nothing():
    model = network()
    known = ranges(model)
    with pytest.warns(NoEffectWarning, match="the loss is 1 with any of 10 ranges: it does not depend on them"):
        found = optimize_ranges(model, data(1), loss=lambda output, batch: torch.tensor(1.0), evaluations=50)
    assert found.power is None and found.before == found.after == 1.0
    assert same(ranges(model), known)


def test_the_search_avoids_ranges_without_a_finite_loss():
    """Every probe above 2**0.3 gives NaN."""
    model = with_rule(2.0)
    origin = steps(model)

    def loss(output, batch):
        moved = torch.stack([(now - start).mean() for now, start in zip(steps(model), origin, strict=True)])
        return (moved - 0.2).square().sum() + (torch.nan if bool((moved > 0.3).any()) else 0.0)

    found = optimize_ranges(model, data(1), loss=loss, powers=(2.0,))
    assert found.after < 0.5 * found.start


def test_many_bits_and_powers_of_two_are_not_searched():
    def loss(output, batch):
        return sum(q.log2_step.mean() for q in quantizers(model))

    model = network(lq.QuantSpec(3, power_of_two=True), 8)
    found = optimize_ranges(model, data(1), loss=loss, evaluations=50)
    assert found.evaluations <= 12
    for layer in (0, 2, 4):
        log2 = weight_quantizer(model[layer]).log2_step
        assert torch.equal(log2, log2.round())


def test_weights_are_rounded_anew_only_if_their_range_has_changed(monkeypatch):
    model = network()
    calls = []
    for layer in (0, 2, 4):
        quantizer = weight_quantizer(model[layer])
        monkeypatch.setattr(
            quantizer, "_quantize", lambda w, q=quantizer, f=quantizer._quantize: (calls.append(q.name), f(w))[1]
        )
    found = optimize_ranges(model, data(), powers=(2.0,), evaluations=100)
    assert len(calls) < 1.5 * found.evaluations  # every layer at every evaluation and batch would be 12 times


# --- widths, losses, ranks ------------------------------------------------------------------------------------------


def test_widths_by_channel_with_pruned_and_two_level_ones():
    model = network(4, 3)
    widths = {"0": [0, 1, 2, 3, 4, 8] * 2, "2": [0] * 4 + [1] * 4, "4": [1, 2, 3]}
    lq.set_bits(model, widths, {"2.input": 1})
    lq.calibrate(model, data())
    found = optimize_ranges(model, data(), evaluations=150)
    assert found.after < found.before
    for layer, bits in widths.items():
        quantizer = weight_quantizer(model[int(layer)])
        assert quantizer.bits.tolist() == bits
        assert quantizer.log2_step.isfinite().all()
        rows = model[int(layer)].weight.detach()
        assert all(row.unique().numel() <= 2**b for row, b in zip(rows, bits, strict=True))
        assert all(not row.any() for row, b in zip(rows, bits, strict=True) if b == 0)


def test_channels_of_a_weight_share_a_factor():
    model = network(3, None)
    found = optimize_ranges(model, data(), evaluations=200)
    reference = with_rule(found.power)
    for layer in (0, 2, 4):
        moved = weight_quantizer(model[layer]).log2_step - weight_quantizer(reference[layer]).log2_step
        torch.testing.assert_close(moved, moved.mean().expand_as(moved))


def test_the_task_loss():
    model = network(2, 2)
    found = optimize_ranges(model, data(), loss="task", evaluations=100)
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
        assert found.after == pytest.approx(float(F.cross_entropy(model.eval()(x), y)), rel=1e-4)
    assert found.after < found.before
    own = network(2, 2)
    again = optimize_ranges(own, data(), loss=lambda output, batch: F.cross_entropy(output, batch[1]), evaluations=100)
    assert again == found
    assert same(ranges(own), ranges(model))


def test_batches_of_unequal_size_count_by_their_samples():
    x = data(1)[0][0]
    parts, whole = network(), network()
    left = optimize_ranges(parts, [x[:5], x[5:]], evaluations=0)
    right = optimize_ranges(whole, iter([x]), evaluations=0)
    np.testing.assert_allclose(left.losses, right.losses, rtol=1e-4)


def test_sums_go_over_ranks():
    """Two ranks with the same batches: sums are twice as large, the loss is the same."""
    asked = []

    def reduce(tensor, operation):
        asked.append(operation)
        return tensor * 2

    alone, together = network(), network()
    left = optimize_ranges(alone, data(), evaluations=30)
    right = optimize_ranges(together, data(), evaluations=30, reduce=reduce)
    assert left == right
    assert asked == ["sum"] * (1 + right.evaluations)


def test_a_forward_and_modes_of_ones_own():
    model = network().train()
    model[1].eval()
    batches = [{"x": x} for x, _ in data()]
    found = optimize_ranges(model, batches, forward=lambda model, batch: {"logits": model(batch["x"])}, evaluations=20)
    assert found == optimize_ranges(network(), data(), evaluations=20)
    assert model.training and model[0].training and not model[1].training


def test_weights_at_calls_keep_their_range():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 3)

        def forward(self, x):
            return self.head((x @ self.weight).relu())

    torch.manual_seed(0)
    model = Product()
    lq.attach(model, 3, 3, structure=lq.inspect(model, data()[0][0]), first_last=None)
    lq.calibrate(model, data())
    at_call = next(q for q in quantizers(model) if "matmul" in q.name and q.is_weight)
    known = at_call.log2_step.clone()
    found = optimize_ranges(model, data(), evaluations=60)
    assert found.after < found.before
    assert torch.equal(at_call.log2_step, known)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(StateError, match=r"lq.optimize_ranges needs a model with quantizers"):
        optimize_ranges(nn.Linear(2, 2), data())
    with pytest.raises(StateError, match=r"calibrated quantizers, 2 have no range \(2.input, 4.input\).*lq.calibrate"):
        optimize_ranges(lq.attach(float_copy(network()), 3, 3), data())
    model = network()
    with pytest.raises(SpecError, match="loss='mse' is unknown; use 'kl', 'task' or a callable"):
        optimize_ranges(model, data(), loss="mse")
    with pytest.raises(SpecError, match="evaluations=-1; give 0"):
        optimize_ranges(model, data(), evaluations=-1)
    with pytest.raises(SpecError, match="powers is empty"):
        optimize_ranges(model, data(), powers=())
    with pytest.raises(SpecError, match="p must be positive, candidates at least 2"):
        optimize_ranges(model, data(), candidates=1)
    with pytest.raises(DataError, match="optimize_ranges got no batches"):
        optimize_ranges(model, [])
    with pytest.raises(DataError, match="did not take a batch of"):
        optimize_ranges(model, [torch.zeros(3, 5)])
    with pytest.raises(DataError, match=r"loss='task' got a batch of Tensor\(32, 6\).*Use loss='kl'"):
        optimize_ranges(model, [x for x, _ in data()], loss="task")
    with pytest.raises(DataError, match="the forward returned int"):
        optimize_ranges(model, data(), forward=lambda model, batch: 1)
    with pytest.raises(DataError, match="loss= returned Tensor"):
        optimize_ranges(model, data(), loss=lambda output, batch: output)
    with pytest.raises(DataError, match="not a finite number with any of the ranges"):
        optimize_ranges(model, data(), loss=lambda output, batch: torch.tensor(torch.nan))
    for site in activation_quantizers(model).values():
        site.seen = None
    with pytest.raises(StateError, match="has no record of its values"):
        optimize_ranges(model, data())


def test_a_failure_leaves_the_model_as_it_was():
    model, known, calls = network().train(), ranges(network()), []

    def loss(output, batch):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return output.sum()

    with pytest.raises(KeyboardInterrupt):
        optimize_ranges(model, data(1), loss=loss)
    assert same(ranges(model), known)
    assert model.training
