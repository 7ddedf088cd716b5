"""Ridge regression against numpy's least squares on the rows themselves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.reconstruction.engine import fit_unit
from lq.reconstruction.options import RunOptions
from lq.reconstruction.reconstruct import reconstruct
from lq.reconstruction.ridge import Regression, ridge_changes
from lq.reconstruction.rounding import WeightGrid
from tests.reconstruction.fitting import Unit
from tests.reconstruction.networks import ResNet, quantized, samples


def by_numpy(ours, theirs, weight, share=0.01):
    """The same by least squares: lambda as rows ``sqrt(lambda) I`` below X^, zeros below the error."""
    ours, theirs, weight = (t.detach().double().numpy() for t in (ours, theirs, weight))
    strength = np.sqrt(share * np.mean(np.sum(ours**2, 0)))
    rows = np.vstack([ours, strength * np.eye(ours.shape[1])])
    wanted = np.vstack([(theirs - ours) @ weight.T, np.zeros((ours.shape[1], len(weight)))])
    return torch.from_numpy(np.linalg.lstsq(rows, wanted, rcond=None)[0].T).float()


def pairs(shape, count=40):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(count, *shape, generator=generator)
    return (whole * 3).round() / 3 + 0.1, whole


def test_linear_layers():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    ours, theirs = pairs((5, 6))
    regression = Regression(layer)
    for a, b in zip(ours.split(7), theirs.split(7), strict=True):
        regression.add(a, b)
    expected = by_numpy(ours.reshape(-1, 6), theirs.reshape(-1, 6), layer.weight)
    torch.testing.assert_close(regression.change(layer.weight), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    ours, theirs = pairs((4, 7, 7), 10)
    regression = Regression(layer)
    regression.add(ours, theirs)
    parts = []
    for g in range(groups):
        inside = slice(g * 4 // groups, (g + 1) * 4 // groups)
        rows = [F.unfold(x[:, inside], 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1) for x in (ours, theirs)]
        parts.append(by_numpy(*rows, layer.weight.chunk(groups)[g].flatten(1)))
    expected = torch.cat(parts).view_as(layer.weight)
    torch.testing.assert_close(regression.change(layer.weight), expected, rtol=1e-3, atol=1e-5)


def test_a_layer_that_did_not_run():
    layer = nn.Linear(3, 2)
    assert not Regression(layer).change(layer.weight).any()


def problem_of(activations=3):
    unit = Unit(weights=8, activations=activations, count=64)
    unit.problem.float_modules = unit.work.units[0].bind(unit.work.twin)
    return unit


def test_changes_of_a_unit_are_those_of_its_layers():
    unit = problem_of()
    grid = WeightGrid(unit.quantizers.weights)
    found = grid.split(ridge_changes(unit.problem, grid, RunOptions(batch_size=10)) * grid.step)
    twin, part, x, wanted = unit.work.twin, unit.model, unit.x, []
    ours, theirs = x, x
    for number, act in ((0, F.relu), (2, F.gelu), (4, None)):  # one after the other, each behind those that are solved
        layer = twin[number]
        with torch.no_grad():
            ours = part[number].input_quantizer(ours) if number else ours  # images have their levels already
            wanted.append(by_numpy(ours, theirs, layer.weight))
            ours, theirs = F.linear(ours, layer.weight + wanted[-1], layer.bias), layer(theirs)
            ours, theirs = (act(t) if act else t for t in (ours, theirs))
    assert not wanted[0].any() and wanted[1].any()
    for change, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5)


def test_it_starts_nearer_with_weights_that_are_hardly_rounded():
    """At 8 bits for weights what is left of the error is that of activations."""
    losses = {}
    for start in ("float", "ridge"):
        unit = problem_of(activations=2)
        options = RunOptions(rounding="nearest", start=start, activation_mode="quantized", loss="mse", drop=0.0)
        losses[start] = fit_unit(unit.problem, options, seed=0).after
    assert losses["ridge"] < 0.95 * losses["float"]


@pytest.mark.parametrize("rounding", ["nearest", "adaround", "ste"])
def test_a_whole_network(rounding):
    torch.manual_seed(0)
    data = list(samples((3, 8, 8), 24).split(8))
    model = quantized(ResNet(2).eval(), data, 4, 3)
    found = reconstruct(model, data, rounding=rounding, start="ridge", iterations=5, batch_size=8)
    assert all(unit.after <= unit.before for unit in found.units)
    for layer in model.modules():
        quantizer = lq.sites.weight_quantizer(layer)
        if quantizer is not None:
            weight = lq.sites.float_weight(layer)
            with torch.no_grad():
                assert torch.equal(quantizer(weight), weight)


def test_sums_of_ranks_are_added():
    unit = problem_of()
    grid = WeightGrid(unit.quantizers.weights)
    alone = ridge_changes(unit.problem, grid, RunOptions())
    doubled = ridge_changes(unit.problem, grid, RunOptions(reduce=lambda t, _: t * 2, ranks=2))
    torch.testing.assert_close(doubled, alone, rtol=1e-5, atol=1e-7)  # the same data on both


def test_a_layer_of_few_rows_stays_as_it_is():
    """Else what is learned are the samples: 39 rows of 8 inputs each are too few, 40 are enough."""
    for count, ranks, changed in ((39, 1, False), (40, 1, True), (20, 2, True)):
        unit = Unit(weights=8, activations=3, count=count)
        unit.problem.float_modules = unit.work.units[0].bind(unit.work.twin)
        grid = WeightGrid(unit.quantizers.weights)
        options = RunOptions(reduce=(lambda t, _: t * 2) if ranks > 1 else None, ranks=ranks)
        assert bool(ridge_changes(unit.problem, grid, options).any()) == changed
