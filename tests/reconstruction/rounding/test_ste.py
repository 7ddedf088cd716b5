"""Weights that move straight through the rounding: against autograd of `lq.quantizer.functional`, and where they go."""

import pytest
import torch

from lq.errors import SpecError
from lq.quantizer.functional import fake_quantize
from lq.reconstruction.options import Options
from lq.reconstruction.rounding import StraightThrough
from tests.reconstruction.rounding.grids import CASES, grid_of, pair, quantized

every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_it_starts_with_nearest_rounding(case):
    layer = quantized(case)
    grid = grid_of(layer)
    learned = StraightThrough().begin(grid)
    with torch.no_grad():
        assert torch.equal(grid.tensors(learned.levels())[0], layer.weight)
        assert torch.equal(learned.hard_levels(), grid.nearest())
    assert learned.penalty() is None


@every_case
def test_levels_and_gradients_are_those_of_moved_weights(case):
    """The oracle rounds the moved weight itself with the quantizer's own step and bounds."""
    layer = quantized(case)
    quantizer, weight = pair(layer)
    grid = grid_of(layer)
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(grid.values.shape, generator=generator) * 0.7 * grid.step
    factors = torch.randn(grid.values.shape, generator=generator)
    learned = StraightThrough().begin(grid)
    with torch.no_grad():
        learned.change.copy_(moves)
    found = learned.levels() * grid.step
    (gradient,) = torch.autograd.grad((found * factors).sum(), learned.parameters)

    moved = (weight.detach() + moves.view(weight.shape)).requires_grad_()
    low, high, offset = quantizer.bounds
    layout = quantizer.layout
    spread = lambda b: layout.spread(b, weight) if isinstance(b, torch.Tensor) else b  # noqa: E731
    log2_step = layout.spread(quantizer.log2_step.detach(), weight)
    expected = layout.join(fake_quantize(layout.split(moved), log2_step, *map(spread, (low, high, offset))))
    (by_hand,) = torch.autograd.grad((expected.flatten() * factors).sum(), moved)
    same = torch.isclose(found, expected.flatten(), rtol=1e-5, atol=1e-7)
    assert same.float().mean() > 0.98  # a weight in the middle of two levels may go either way
    steps = grid.values + moves / grid.step
    ends = [torch.as_tensor(b) for b in (grid.low, grid.high)]
    away = same & ((steps - ends[0]).abs() > 1e-4) & ((steps - ends[1]).abs() > 1e-4)
    torch.testing.assert_close(gradient[away], by_hand.flatten()[away], rtol=1e-5, atol=1e-6)


def test_a_weight_may_move_by_several_levels():
    grid = grid_of(quantized("zero points"))
    learned = StraightThrough(lr=1.0).begin(grid)
    target = grid.clamp(grid.nearest() + 2) * grid.step
    optimizer = torch.optim.Adam(learned.parameters, lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        ((learned.levels() * grid.step - target) ** 2).sum().backward()
        optimizer.step()
    moved = (learned.hard_levels() - grid.nearest()).abs()
    inside = grid.values.abs() < 1  # those that were clipped have no gradient
    assert moved[inside].max() >= 2
    assert ((learned.hard_levels() * grid.step - target).abs() < 1e-5)[inside].float().mean() > 0.9


@pytest.mark.parametrize(("iterations", "share"), [(3_000, 1), (1_500, 2), (100, 10), (20_000, 1)])
def test_rates(iterations, share):
    assert Options(rounding="ste", iterations=iterations).rates == pytest.approx((2e-5 * share, 2e-4 * share))
    given = Options(rounding=StraightThrough(lr=0.5), step_lr=0.1, iterations=iterations)
    assert given.rates == (0.5, 0.1)


def test_errors():
    with pytest.raises(SpecError, match=r"StraightThrough\(lr=0\): the learning rate must be positive"):
        StraightThrough(lr=0)
