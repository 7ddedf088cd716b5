"""Quantiles of channels from bounded counts."""

import pytest
import torch

from lq.attachment.preparation.channel_ranges import ChannelRanges
from lq.errors import DataError


def test_quantiles_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 6, generator=generator) * torch.tensor([1e-3, 0.1, 1, 5, 100, 1e4]) + torch.arange(6)
    ranges = ChannelRanges(6, dim=1, name="x")
    for part in x.split([1, 5000, 14999]):
        ranges.update(part)
    for share in (0.001, 0.01, 0.5, 0.99, 0.999):
        found, _ = ranges.quantiles(share, share)
        expected = torch.quantile(x.double(), share, dim=0)
        width = x.amax(0) - x.amin(0)
        assert bool(((found - expected).abs() < 0.04 * expected.abs() + 0.01 * width).all())
    mean, square = ranges.means()
    assert torch.allclose(mean, x.double().mean(0), rtol=1e-3, atol=1e-5)
    assert torch.allclose(square, x.double().square().mean(0), rtol=1e-5)


def test_order_and_ranks_do_not_matter():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    one, other, two = (ChannelRanges(3, dim=1, name="x") for _ in range(3))
    one.update(x)
    other.update(x[40:])
    two.update(x[:40])
    mine = [other.counts, other.sums]

    def add(tensor, operation):
        assert operation == "sum"
        return tensor + mine.pop(0).to(tensor)

    two.reduce(add, torch.device("cpu"))
    assert torch.equal(one.counts, two.counts)
    assert torch.allclose(one.sums, two.sums, rtol=1e-4, atol=1e-4)


def test_a_rank_without_values():
    ranges = ChannelRanges(3, dim=1, name="x")
    ranges.reduce(lambda tensor, _: tensor, torch.device("cpu"))
    assert not ranges.seen
    assert all(bool((end == 0).all()) for end in ranges.quantiles(0.1, 0.9))


def test_channels_lie_along_the_dimension():
    x = torch.randn(2, 3, 4, 5)
    one, other = ChannelRanges(3, dim=1, name="x"), ChannelRanges(3, dim=-1, name="x")
    one.update(x)
    other.update(x.movedim(1, -1))
    assert torch.equal(one.counts, other.counts)


def test_zeros_and_extremes():
    ranges = ChannelRanges(1, dim=1, name="x")
    ranges.update(torch.tensor([[0.0], [0.0], [0.0], [1e30], [-1e-30]]))
    low, high = ranges.quantiles(0.2, 0.7)
    assert abs(float(low)) < 1e-5
    assert abs(float(high)) < 1e-5


def test_no_numbers():
    with pytest.raises(DataError, match="what it gives has 1 NaN or Inf of 2 values"):
        ChannelRanges(2, dim=1, name="what it gives").update(torch.tensor([[1.0, torch.nan]]))
