"""Roundings by name, and what all of them promise."""

import pytest
import torch

from lq.errors import SpecError
from lq.reconstruction.rounding import AdaRound, AnnealingSoftmax, Nearest, StraightThrough, rounding_of
from tests.reconstruction.rounding.grids import CASES, grid_of, quantized

ROUNDINGS = {"nearest": Nearest, "adaround": AdaRound, "softmax": AnnealingSoftmax, "ste": StraightThrough}
every_rounding = pytest.mark.parametrize("name", ROUNDINGS)


@every_rounding
def test_names(name):
    assert rounding_of(name) == ROUNDINGS[name]()
    own = ROUNDINGS[name](lr=0.5)
    assert rounding_of(own) is own


def test_an_unknown_name():
    message = "rounding='up' is unknown; use 'nearest', 'adaround', 'softmax'.* or a rounding object"
    with pytest.raises(SpecError, match=message):
        rounding_of("up")


@every_rounding
@pytest.mark.parametrize("case", CASES)
def test_hard_levels_lie_on_the_grid_whatever_was_learned(name, case):
    grid = grid_of(quantized(case))
    learned = rounding_of(name).begin(grid)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 5)
    learned.advance(1.0)
    hard = learned.hard_levels()
    assert not hard.requires_grad
    assert torch.equal(grid.nearest(hard), hard)
    assert hard.shape == learned.levels().shape == grid.values.shape


@every_rounding
def test_levels_carry_gradients_to_the_parameters(name):
    grid = grid_of(quantized("one width"))
    learned = rounding_of(name).begin(grid)
    assert bool(learned.parameters) == (name != "nearest")
    if learned.parameters:
        grads = torch.autograd.grad(grid.tensors(learned.levels())[0].square().sum(), learned.parameters)
        assert all(grad.abs().sum() > 0 for grad in grads)


def test_nearest_learns_nothing():
    grid = grid_of(quantized("transposed, in groups"))
    learned = Nearest().begin(grid)
    learned.advance(0.5)
    assert torch.equal(learned.levels(), grid.nearest())
    assert torch.equal(learned.hard_levels(), grid.nearest())
    assert learned.penalty() is None
