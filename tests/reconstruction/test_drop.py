"""Schedules of what stays float, and the masks that choose it."""

import pytest
import torch

from lq.errors import SpecError
from lq.reconstruction.drop import Annealed, Constant, drop_of, random_mask


def test_constant():
    assert [Constant(0.3)(done) for done in (0.0, 0.5, 1.0)] == [0.3] * 3
    assert Constant()(0.7) == 0.5


@pytest.mark.parametrize(
    ("done", "expected"), [(0.0, 0.6), (0.25, 0.3), (0.4, 0.12), (0.5, 0.0), (0.9, 0.0), (1.0, 0.0)]
)
def test_annealed_falls_linearly(done, expected):
    assert Annealed(0.6, until=0.5)(done) == pytest.approx(expected)


def test_by_name_and_number():
    assert drop_of(0.25) == Constant(0.25) and drop_of(0) == Constant(0.0) and drop_of(1) == Constant(1.0)
    assert drop_of("annealed") == Annealed(0.5, 0.8)
    own = lambda done: done  # noqa: E731
    assert drop_of(own) is own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: drop_of("anneal"), "drop='anneal' is unknown; use a probability, 'annealed' or a function of progr"),
        (lambda: drop_of(1.5), "drop=1.5 is no probability; give a number from 0 to 1"),
        (lambda: Constant(-0.1), "drop=-0.1 is no probability"),
        (lambda: Annealed(start=1.1), r"Annealed\(start=1.1, until=0.8\): both are shares from 0 to 1"),
        (lambda: Annealed(until=0), "both are shares"),
    ],
)
def test_errors(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(64, 1000), (63, 1017), (7, 9, 1021)])
@pytest.mark.parametrize("probability", [0.01, 0.25, 0.5, 0.9, 0.99])
def test_masks_have_their_share_of_ones(probability, shape):
    mask = random_mask(torch.empty(shape, dtype=torch.float16), probability, generator())
    assert mask.shape == shape and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    share = round(probability * 256) / 256
    deviation = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - share) < 5 * deviation


def test_masks_are_independent_from_element_to_element():
    mask = random_mask(torch.empty(400, 512), 0.5, generator()) * 2 - 1
    correlation = (mask.T @ mask / 400).fill_diagonal_(0).abs()
    assert correlation.max() < 0.35 and correlation.mean() < 0.06
    lag = [(mask.flatten()[k:] * mask.flatten()[:-k]).mean().abs().item() for k in range(1, 17)]
    assert max(lag) < 0.01


def test_masks_by_seed():
    like, other = torch.empty(50), generator()
    first = random_mask(like, 0.5, generator())
    assert torch.equal(first, random_mask(like, 0.5, other))
    assert not torch.equal(first, random_mask(like, 0.5, other))
    assert not torch.equal(first, random_mask(like, 0.5, generator(1)))


def test_masks_leave_the_global_state_alone():
    before = torch.get_rng_state()
    random_mask(torch.empty(50), 0.5, generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_of_none_and_all():
    like = torch.empty(5, 3)
    assert random_mask(like, 0.0, generator()) is None
    assert random_mask(like, 0.001, generator()) is None
    assert torch.equal(random_mask(like, 1.0, generator()), torch.ones(5, 3))
    assert random_mask(torch.empty(0, 3), 0.5, generator()).shape == (0, 3)
