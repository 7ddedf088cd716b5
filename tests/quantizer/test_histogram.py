"""Histograms: exact counts, whatever the order, the batches and the ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.errors import DataError
from lq.quantizer.histogram import BINS, Histogram, raise_if_not_finite


class Ranks:
    """Threads that stand for ranks, with an all-reduce between them."""

    def __init__(self, count):
        self.slots = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)

    def reduce(self, rank):
        def combine(tensor, operation):
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            stacked = torch.stack(self.slots)
            combined = {"sum": lambda: stacked.sum(0), "min": lambda: stacked.amin(0), "max": lambda: stacked.amax(0)}
            result = combined[operation]()
            self.barrier.wait()
            return result

        return combine

    def run(self, work):
        """What `work(rank, reduce)` returns on each rank."""
        ranks = range(len(self.slots))
        with ThreadPoolExecutor(len(self.slots)) as pool:
            return list(pool.map(lambda rank: work(rank, self.reduce(rank)), ranks))


def histogram_of(batches, tokens=False):
    histogram = Histogram(tokens=tokens)
    for batch in batches:
        histogram.update(batch)
    return histogram


def assert_same(a, b):
    assert (a.low, a.high, a.exponent, a.octave) == (b.low, b.high, b.exponent, b.octave)
    assert torch.equal(a.counts, b.counts)


def batches_of(seed, sizes=(3, 1, 5, 2)):
    """Batches of very different sizes of values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, 6, generator=generator) * 4.0 ** (i - 2) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("tokens", [False, True])
def test_order_and_batches_do_not_matter(tokens):
    batches = batches_of(0)
    whole = histogram_of([torch.cat(batches)], tokens)
    assert_same(histogram_of(batches, tokens), whole)
    assert_same(histogram_of(batches[::-1], tokens), whole)
    assert whole.total == 11 * 24


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -4.0, 0.5, 3.7, 1e-30, -1e20, 255.0]), min_size=2, max_size=6))
def test_order_does_not_matter_for_exact_powers_of_two(values):
    batches = [torch.tensor([[value]]) for value in values]
    whole = histogram_of([torch.cat(batches)])
    assert_same(histogram_of(batches), whole)
    assert_same(histogram_of(batches[::-1]), whole)


@pytest.mark.parametrize("tokens", [False, True])
def test_ranks_add_up(tokens):
    batches = batches_of(1)
    shares = [batches[:1], batches[1:]]

    def rank(index, reduce):
        histogram = histogram_of(shares[index], tokens)
        histogram.reduce(reduce, torch.device("cpu"))
        return histogram

    for histogram in Ranks(2).run(rank):
        assert_same(histogram, histogram_of(batches, tokens))


def test_a_rank_without_data_gets_that_of_the_others():
    shares = [[], batches_of(2)]

    def rank(index, reduce):
        histogram = histogram_of(shares[index])
        histogram.reduce(reduce, torch.device("cpu"))
        return histogram

    for histogram in Ranks(2).run(rank):
        assert_same(histogram, histogram_of(shares[1]))


def test_ranks_without_any_data_stay_empty():
    def rank(index, reduce):
        histogram = Histogram()
        histogram.reduce(reduce, torch.device("cpu"))
        return histogram

    assert [histogram.counts for histogram in Ranks(2).run(rank)] == [None, None]


def test_counts_are_those_of_a_loop():
    values = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 3
    histogram = histogram_of([values[None]])
    width = 2.0**histogram.exponent / (BINS // 2)
    expected = [0] * BINS
    for value in values.double().tolist():
        expected[int(value // width) + BINS // 2] += 1
    assert histogram.counts.sum(0).tolist() == expected
    assert 2.0 ** (histogram.exponent - 1) <= values.abs().max() < 2.0**histogram.exponent


def test_samples_are_near_the_values_and_their_extremes_exact():
    values = torch.randn(1, 500, generator=torch.Generator().manual_seed(4))
    samples = histogram_of([values]).samples()
    width = 2.0 ** histogram_of([values]).exponent / (BINS // 2)
    repeated = samples.values[0].repeat_interleave(samples.counts)
    torch.testing.assert_close(repeated.sort().values, values[0].sort().values, rtol=0, atol=width)
    assert (samples.low.item(), samples.high.item()) == (values.min().item(), values.max().item())


def test_sizes_are_the_octaves_of_the_rows():
    rows = torch.tensor([[3.0, -3.0], [0.25, 0.25], [8.5, 0.0]])
    samples = histogram_of([rows]).samples()
    found = sorted(zip(samples.values[0].tolist(), samples.sizes.tolist(), strict=True))
    assert [size for _, size in found] == [4.0, 8.0, 0.25, 4.0, 8.0]
    assert [round(value, 1) for value, _ in found] == [-3.0, 0.0, 0.3, 3.0, 8.5]


@pytest.mark.parametrize(("tokens", "rows"), [(False, 2), (True, 6)])
def test_rows_are_samples_or_tokens(tokens, rows):
    x = torch.ones(2, 3, 4) * torch.exp2(torch.arange(6.0)).view(2, 3, 1)
    assert histogram_of([x], tokens).samples().sizes.unique().numel() == rows


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.zeros(2, 0)])
def test_empty_tensors_count_nothing(x):
    assert histogram_of([x]).total == 0
    assert histogram_of([x]).samples().values.numel() == 0


def test_scalars_and_half_precision():
    histogram = histogram_of([torch.tensor(2.5), torch.tensor([[1.5, -3.0]], dtype=torch.bfloat16)])
    assert (histogram.low, histogram.high, histogram.total) == (-3.0, 2.5, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_an_error(bad):
    x = torch.tensor([[1.0, bad, bad]])
    with pytest.raises(DataError, match="fc has 2 NaN or Inf of 3 values; look for a too large learning rate"):
        Histogram("fc").update(x)
    with pytest.raises(DataError, match="w has 2 NaN or Inf of 3 values"):
        raise_if_not_finite(x, "w")
