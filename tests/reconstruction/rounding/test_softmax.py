"""The annealing softmax: its expectation in float64, where it starts and where it ends."""

import math

import pytest
import torch

from lq.errors import SpecError
from lq.reconstruction.rounding import AnnealingSoftmax
from tests.reconstruction.rounding.grids import CASES, grid_of, inside, pair, quantized

OFFSETS = [(0, 1), (-1, 0, 1), (-1, 0, 1, 2)]
every_set = pytest.mark.parametrize("offsets", OFFSETS, ids=str)


@every_set
@pytest.mark.parametrize("case", CASES)
def test_it_starts_at_the_float_weights(case, offsets):
    layer = quantized(case)
    weight, within = pair(layer)[1].detach(), inside(layer)
    grid = grid_of(layer)
    soft = grid.tensors(AnnealingSoftmax(offsets).begin(grid).levels())[0].detach()
    torch.testing.assert_close(soft[within], weight[within], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(soft[~within], layer.weight[~within], rtol=0, atol=1e-6)  # clipped ones


@every_set
def test_it_starts_there_at_any_temperature(offsets):
    grid = grid_of(quantized("one width"))
    usual = AnnealingSoftmax(offsets).begin(grid)
    warm = AnnealingSoftmax(offsets, temperature=(7.0, 0.1)).begin(grid)
    torch.testing.assert_close(warm.levels(), usual.levels(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offsets", [(0, 1), (-1, 0, 1, 2)], ids=str)  # of others almost, at fractions near a half
def test_its_hard_start_is_nearest_rounding(offsets):
    layer = quantized("a width for each channel")
    grid = grid_of(layer)
    with torch.no_grad():
        assert torch.equal(grid.tensors(AnnealingSoftmax(offsets).begin(grid).hard_levels())[0], layer.weight)


@every_set
@pytest.mark.parametrize("done", [0.0, 0.3, 1.0])
def test_levels_are_the_expectation_of_the_offsets(done, offsets):
    grid = grid_of(quantized("transposed"))
    learned = AnnealingSoftmax(offsets, temperature=(2.0, 0.05)).begin(grid)
    with torch.no_grad():
        learned.v.add_(torch.randn(learned.v.shape, generator=torch.Generator().manual_seed(0)))
    learned.advance(done)
    tau = 2.0 * 0.025**done
    expected = []
    for x, logits in zip(grid.values.double().tolist(), learned.v.detach().double().T.tolist(), strict=True):
        powers = [math.exp((logit - max(logits)) / tau) for logit in logits]
        mean = sum(p * o for p, o in zip(powers, sorted(offsets), strict=True)) / sum(powers)
        expected.append(min(max(math.floor(x) + mean, grid.low), grid.high))
    found = learned.levels().detach().double()
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-4)
    assert learned.penalty() is None


@every_set
def test_it_ends_one_hot(offsets):
    grid = grid_of(quantized("a width for each channel"))
    learned = AnnealingSoftmax(offsets).begin(grid)
    with torch.no_grad():
        learned.v.add_(torch.randn(learned.v.shape, generator=torch.Generator().manual_seed(1)))
    apart = []
    for done in (0.0, 0.5, 1.0):
        learned.advance(done)
        apart.append((learned.levels().detach() - learned.hard_levels()).abs().mean().item())
    assert apart[0] > apart[1] > apart[2]
    two = learned.v.detach().topk(2, 0).values
    decided = two[0] - two[1] > 0.1
    assert decided.float().mean() > 0.9
    assert (learned.levels().detach() - learned.hard_levels())[decided].abs().max() < 1e-3


@every_set
def test_the_offset_of_the_largest_logit_is_chosen(offsets):
    grid = grid_of(quantized("one width"))
    learned = AnnealingSoftmax(offsets).begin(grid)
    for k, offset in enumerate(sorted(offsets)):
        with torch.no_grad():
            learned.v.zero_()
            learned.v[k] = 1.0
        expected = ((grid.values + 1e-4).floor() + offset).clamp(grid.low, grid.high)
        assert torch.equal(learned.hard_levels(), expected)


def test_offsets_may_come_in_any_order():
    grid = grid_of(quantized("one width"))
    a, b = (AnnealingSoftmax(offsets).begin(grid) for offsets in ((0, 1), [1, 0]))
    assert torch.equal(a.levels(), b.levels())
    assert torch.equal(a.hard_levels(), b.hard_levels())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offsets": (0, 2)}, r"offsets=\(0, 2\): expected distinct integers with 0 and 1 among them"),
        ({"offsets": (0, 1, 1)}, "expected distinct integers"),
        ({"temperature": (1.0, 0.0)}, r"temperature=\(1.0, 0.0\), lr=.*: all must be positive"),
        ({"lr": 0}, "all must be positive"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(SpecError, match=message):
        AnnealingSoftmax(**arguments)
