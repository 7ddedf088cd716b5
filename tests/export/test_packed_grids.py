"""Grids in packed files: zero points, learned ranges and widths, and how quantizers were made."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import input_quantizer, quantizers, weight_quantizer
from lq.callbacks import LearnNoiseScale, Quantize
from lq.export.integers import settled_zero_point
from tests.attachment.networks import images, quantized, small
from tests.export.exported import activations, weights
from tests.export.files import QUIETLY, calibrated, round_trip
from tests.helpers import fit, tiny

pytestmark = QUIETLY


@pytest.mark.parametrize("symmetric", [True, False])
def test_specs_say_how_quantizers_were_made(symmetric, tmp_path):
    model = quantized(weights=3, symmetric=symmetric, first_last=None)
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    for mine, theirs in zip(quantizers(model), quantizers(loaded), strict=True):
        assert theirs.spec.symmetric is mine.spec.symmetric is (symmetric and mine.is_weight)
        assert (theirs.spec.bits, theirs.spec.per_channel) == (mine.spec.bits, mine.spec.per_channel)
    lq.set_bits(loaded, {"*": 2})
    zeros = torch.cat([settled_zero_point(q) for q in quantizers(loaded) if q.is_weight])
    assert bool((zeros == 2).all()) is symmetric  # ranges that are found anew are of the kind


def test_a_model_that_came_from_a_state_dict_comes_back(tmp_path):
    """Its quantizers do not know how they were made."""
    model = lq.load(quantized(symmetric=False, weights=3).state_dict(), small(9)).eval()
    assert all(q.spec is None for q in quantizers(model))
    round_trip(model, small(1).eval(), images(), tmp_path)


def test_weights_that_are_never_negative_find_ranges_like_before(tmp_path):
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.abs_()
    model = lq.attach(nn.Sequential(layer), 4, first_last=None)
    lq.save(model, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(8, 4)))
    for part in (model, loaded):
        lq.set_bits(part, {"0": 3})
    assert torch.equal(weight_quantizer(loaded[0]).zero_point, weight_quantizer(model[0]).zero_point)


@pytest.mark.parametrize("between", [nn.ReLU, nn.Tanh])
def test_activations_of_a_fixed_zero_come_back(between, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), between(), nn.Linear(6, 3)).eval()

    x, spec = torch.randn(16, 6), lq.QuantSpec(4, per_channel=False)
    loaded = round_trip(calibrated(build(0), x, weights=4, activations=spec), build(1), x, tmp_path)
    assert input_quantizer(loaded[2]).spec.symmetric
    assert float(input_quantizer(loaded[2]).zero_point) == (0 if between is nn.ReLU else 128)


def test_weights_in_another_memory_format_come_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2))
        return model.to(memory_format=torch.channels_last).eval()

    x = torch.randn(2, 3, 8, 8)
    round_trip(calibrated(build(0), x, weights=3, activations=4), build(1), x, tmp_path)


def test_layers_with_parametrizations_of_others_come_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        second = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        return nn.Sequential(first, second, nn.Linear(6, 3)).eval()

    round_trip(lq.attach(build(0), 3), build(1), torch.randn(4, 6), tmp_path)


@pytest.mark.parametrize("zero", [-70000.0, -300.0, -3.0, 0.3, 2.5, 3.5, 127.4, 255.0, 256.0, 32768.0, 65535.0])
@pytest.mark.parametrize("bits", [3, 16])
def test_zero_points_of_any_size(zero, bits, tmp_path):
    model = calibrated(small(), images(), weights=weights(4), activations=activations(bits), first_last=None)
    quantizer = input_quantizer(model[6])
    with torch.no_grad():
        quantizer.zero_point.fill_(zero)
    quantizer.refresh()
    lq.set_estimator(model, "lsq_plus")
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    assert float(settled_zero_point(input_quantizer(loaded[6]))) == round(zero)


def test_learned_zero_points_come_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 3)).eval()

    x = torch.randn(32, 6)
    model = calibrated(build(0), x, weights=4, activations=3, symmetric=False, first_last=None, estimator="lsq_plus")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for quantizer in quantizers(model):
        quantizer.refresh()
    moved = [not torch.equal(q.zero_point, q.zero_point.round()) for q in quantizers(model)]
    assert any(moved[i] for i, q in enumerate(quantizers(model)) if q.is_weight)
    assert any(moved[i] for i, q in enumerate(quantizers(model)) if not q.is_weight)
    round_trip(model, build(1), x, tmp_path)


def test_learned_widths_come_back_once_they_are_settled(tmp_path):
    module = tiny()
    fit(module, [Quantize(8, 8, fold_bn=False), LearnNoiseScale(3, 3, until=0.5, quantizer_lr=0.1)], max_epochs=2)
    assert {3.0, 8.0} <= {float(b) for q in quantizers(module) for b in q.bits.detach().flatten()}
    round_trip(module.eval(), tiny(3).eval(), torch.randn(4, 1, 6, 6), tmp_path)


def test_widths_for_channels_that_are_learned_and_pruned_come_back(tmp_path):
    module = tiny()
    fit(
        module,
        [Quantize(8, 8, fold_bn=False), LearnNoiseScale(2, 4, first_last=None, until=0.5, quantizer_lr=0.3)],
        max_epochs=2,
    )
    round_trip(module.eval(), tiny(3).eval(), torch.randn(4, 1, 6, 6), tmp_path)


def test_activations_alone_come_back(tmp_path):
    model = quantized(weights=None, activations=4)
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    assert weight_quantizer(loaded[2]) is None


def test_a_model_with_baked_weights_comes_back(tmp_path):
    model = lq.detach(quantized(weights=3, activations=4), bake=True)
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    assert torch.equal(loaded[2].weight, model[2].weight)
