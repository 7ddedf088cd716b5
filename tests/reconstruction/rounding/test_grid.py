"""The flat view of a unit's weights against loops over channels, for every kind of grid."""

import pytest
import torch
from torch import nn

import lq
from lq.reconstruction.rounding import WeightGrid
from tests.reconstruction.rounding.grids import CASES, channel_rows, grid_of, pair, quantized

every_case = pytest.mark.parametrize("case", CASES)


def spread(values, layer):
    """One value for each weight, of one for each channel or one for all, in the shape of the weight."""
    found = torch.zeros_like(pair(layer)[1])
    rows = channel_rows(layer, found)
    for row, value in zip(rows, values.detach().expand(len(rows)), strict=True):
        row.fill_(value)
    return found


def flat(bound, like):
    return bound if isinstance(bound, torch.Tensor) else torch.full_like(like, float(bound))


@every_case
def test_each_weight_has_the_grid_of_its_channel(case):
    layer = quantized(case)
    quantizer, weight = pair(layer)
    grid = grid_of(layer)
    (step,) = grid.split(grid.step)
    assert torch.equal(step, spread(quantizer.step, layer))
    assert torch.equal(grid.values, (weight.detach() / step).flatten())
    low, high, offset = (grid.split(flat(b, grid.values))[0] for b in (grid.low, grid.high, grid.offset))
    zero, bits = spread(quantizer.zero_point, layer), spread(quantizer.bits, layer)
    assert torch.equal(low, -zero)
    assert torch.equal(high, 2**bits - 1 - zero)
    assert torch.equal(offset, zero % 1)
    assert bool((offset == 0.5).any()) == (bool((bits == 1).any()) and quantizer.spec.symmetric)


@every_case
def test_nearest_is_what_the_quantizer_does(case):
    layer = quantized(case)
    quantizer, weight = pair(layer)
    grid = grid_of(layer)
    with torch.no_grad():
        assert torch.equal(grid.tensors(grid.nearest())[0], quantizer(weight))


@every_case
def test_written_weights_are_levels_that_rounding_keeps(case):
    layer = quantized(case)
    quantizer, weight = pair(layer)
    grid = grid_of(layer)
    generator = torch.Generator().manual_seed(3)
    moved = grid.values.floor() + torch.randint(-2, 3, grid.values.shape, generator=generator)
    levels = grid.clamp(moved + grid.offset)
    grid.write(levels)
    with torch.no_grad():
        assert torch.equal(quantizer(weight), weight)
    assert torch.equal(weight.detach().flatten(), levels * grid.step)
    for row, bits in zip(channel_rows(layer, weight), spread_bits(quantizer, layer), strict=True):
        assert row.unique().numel() <= 2 ** int(bits)
        assert bits > 0 or not row.any()


def spread_bits(quantizer, layer):
    return quantizer.bits.detach().expand(len(channel_rows(layer, pair(layer)[1])))


def test_several_layers_are_one_vector_and_come_apart_again():
    layers = [quantized(case, seed) for seed, case in enumerate(CASES)]
    grid = grid_of(*layers)
    weights = [pair(layer)[1].detach() for layer in layers]
    assert grid.values.shape == (sum(w.numel() for w in weights),)
    for part, weight in zip(grid.tensors(grid.values), weights, strict=True):
        assert part.shape == weight.shape
        torch.testing.assert_close(part, weight, rtol=1e-6, atol=0)
    parts = zip(grid.tensors(grid.nearest()), layers, strict=True)
    with torch.no_grad():
        assert all(torch.equal(part, layer.weight) for part, layer in parts)


def test_bounds_are_numbers_only_where_all_weights_share_them():
    assert isinstance(grid_of(quantized("one width"), quantized("one width", 1)).low, float)
    assert isinstance(grid_of(quantized("one width"), quantized("transposed")).low, torch.Tensor)
    assert isinstance(grid_of(quantized("one width"), quantized("transposed")).offset, float)


@every_case
def test_clamp_passes_gradients_inside_alone(case):
    grid = grid_of(quantized(case))
    low, high = (flat(b, grid.values) for b in (grid.low, grid.high))
    levels = (torch.stack([low - 1, (low + high) / 2, high + 1])).requires_grad_()
    grid.clamp(levels).sum().backward()
    wide = (high > low).float()
    assert torch.equal(levels.grad[0], torch.zeros_like(low))
    assert torch.equal(levels.grad[2], torch.zeros_like(low))
    assert torch.equal(levels.grad[1] * wide, wide)


def test_half_precision_weights_keep_their_levels():
    layer = lq.attach(nn.Sequential(nn.Linear(9, 6)), 8, first_last=None).to(torch.bfloat16).eval()[0]
    quantizer, weight = pair(layer)
    grid = WeightGrid([(quantizer, weight)])
    levels = grid.nearest()
    grid.write(levels)
    with torch.no_grad():
        assert torch.equal(quantizer(weight), weight)
    assert weight.dtype == torch.bfloat16 and grid.values.dtype == torch.float32
    assert torch.equal(torch.round(weight.detach().float().flatten() / grid.step), levels)


def test_no_weights_at_all():
    grid = WeightGrid([])
    assert grid.values.shape == (0,)
    assert grid.tensors(grid.nearest()) == []
