"""Roundings by name, and what all of them promise."""

from functools import partial

import pytest
import torch

from lq.errors import SpecError
from lq.reconstruction.options import Options
from lq.reconstruction.rounding import (
    _NAMED,
    AdaRound,
    AnnealingSoftmax,
    Nearest,
    Rates,
    Rounding,
    StraightThrough,
    rounding_of,
)
from tests.reconstruction.rounding.grids import CASES, grid_of, quantized

ROUNDINGS = {
    "nearest": Nearest,
    "adaround": AdaRound,
    "softmax": AnnealingSoftmax,
    "wide_softmax": partial(AnnealingSoftmax, offsets=(-1, 0, 1)),
    "ste": StraightThrough,
}
LEARNS_NOTHING = {"nearest"}
every_rounding = pytest.mark.parametrize("name", ROUNDINGS)


def test_every_name_is_here():
    assert set(ROUNDINGS) == set(_NAMED)
    assert set(ROUNDINGS) > LEARNS_NOTHING


@every_rounding
def test_names(name):
    assert rounding_of(name) == ROUNDINGS[name]()
    own = ROUNDINGS[name](lr=0.5)
    assert rounding_of(own) is own


@pytest.mark.parametrize(
    "given", ["up", 5, None, ["adaround"], AdaRound, object()], ids=lambda value: type(value).__name__
)
def test_what_is_no_rounding(given):
    message = (
        r"^rounding=.* is unknown; use 'nearest', 'adaround', 'softmax'.* or a rounding object, of a subclass of Ro"
    )
    with pytest.raises(SpecError, match=message):
        rounding_of(given)


class Plain(Rounding):
    """A rounding that says nothing of its rates."""

    lr = None

    def begin(self, grid):
        return Nearest().begin(grid)


class Fast(Plain):
    rates = Rates(0.3, 0.2, 100)


def test_rates_are_adarounds_where_a_rounding_has_none():
    assert rounding_of(Plain()).falls is False
    assert Options(rounding=Plain(), iterations=20_000).rates == (1e-3, 1e-4)
    assert Options(rounding=Fast(), iterations=50).rates == pytest.approx((0.6, 0.4))


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
    assert bool(learned.parameters) == (name not in LEARNS_NOTHING)
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
