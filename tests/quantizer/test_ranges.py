"""Range rules against brute force, and the grids made of their ranges."""

import numpy as np
import pytest
import torch

from lq.errors import SpecError
from lq.quantizer.histogram import Histogram
from lq.quantizer.ranges import Levels, Lp, LsqInit, MinMax, Percentile, Samples, range_rule
from tests.quantizer.test_functional import reference

KINDS = {"signed": (True, True), "unsigned": (True, False), "zero point": (False, True)}


def levels_of(bits, kind="signed", channels=1, power_of_two=False):
    symmetric, signed = KINDS[kind]
    return Levels(torch.full((channels,), float(bits)), symmetric, signed, power_of_two)


def grid(low, high, bits, kind):
    """Step, lowest and highest level and offset of the grid of a range, in float64."""
    low, high, top = min(low, 0.0), max(high, 0.0), 2.0**bits - 1
    if kind == "unsigned":
        return high / top, 0.0, top, 0.0
    if kind == "signed":
        zero = 0.5 if bits == 1 else 2.0 ** (bits - 1)
        return max(high / (top - zero), -low / zero), -zero, top - zero, zero % 1
    step = (high - low) / top
    zero = round(-low / step)
    return step, -zero, top - zero, 0.0


def brute_error(values, low, high, bits, kind, p, weights=None):
    """The L_p error of the grid of a range, in float64."""
    errors = [abs(reference(v, *grid(low, high, bits, kind)) - v) ** p for v in values]
    return float(np.dot(errors, np.ones(len(errors)) if weights is None else weights))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_gives_the_grid_of_a_range(kind, bits):
    low, high = -0.73, 1.91
    step, zero = levels_of(bits, kind).fit(torch.tensor([low]), torch.tensor([high]))
    expected = grid(low, high, bits, kind)
    assert step.item() == pytest.approx(expected[0], rel=1e-6)
    assert zero.item() == -expected[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [0, 4])
def test_a_range_without_width_gets_a_usable_step(kind, bits):
    step, zero = levels_of(bits, kind).fit(torch.zeros(1), torch.zeros(1))
    assert step.item() == 1.0
    assert 0 <= zero.item() <= 2**bits - 1


@pytest.mark.parametrize("kind", KINDS)
def test_power_of_two_steps(kind):
    step, _ = levels_of(4, kind, power_of_two=True).fit(torch.tensor([-0.7]), torch.tensor([1.9]))
    expected = grid(-0.7, 1.9, 4, kind)[0]
    assert step.item() == 2.0 ** round(np.log2(expected))


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_lp_is_the_best_shrink(kind, bits, p):
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(bits))
    values = values.abs() if kind == "unsigned" else values
    low, high = Lp(p, candidates=50)(Samples(values), levels_of(bits, kind, channels=3))
    for row, row_low, row_high in zip(values.double().tolist(), low.tolist(), high.tolist(), strict=True):
        ends = min(*row, 0.0), max(*row, 0.0)
        errors = {i: brute_error(row, ends[0] * i / 50, ends[1] * i / 50, bits, kind, p) for i in range(1, 51)}
        found = brute_error(row, row_low, row_high, bits, kind, p)
        assert 0.9999 * min(errors.values()) <= found <= 1.1 * min(errors.values())
        assert row_high / ends[1] * 50 == pytest.approx(round(row_high / ends[1] * 50), abs=1e-3)


def test_lp_with_a_zero_point_comes_near_the_best_of_all_ranges():
    values = torch.cat([torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.tensor([9.0])])[None]
    low, high = Lp(2.4, candidates=20)(Samples(values), levels_of(3, "zero point"))
    row, ends = values[0].double().tolist(), (values.min().item(), values.max().item())
    shrinks = [(i / 20, j / 20) for i in range(1, 21) for j in range(1, 21)]
    best = min(brute_error(row, ends[0] * a, ends[1] * b, 3, "zero point", 2.4) for a, b in shrinks)
    found = brute_error(row, low.item(), high.item(), 3, "zero point", 2.4)
    assert best * (1 - 1e-6) <= found <= best * 1.1
    assert found < 0.9 * brute_error(row, *ends, 3, "zero point", 2.4)


@pytest.mark.parametrize("rule", [Lp(), Percentile(90), LsqInit(), MinMax()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_stand_for_repeated_values(rule, kind):
    generator = torch.Generator().manual_seed(4)
    values, counts = torch.randn(31, generator=generator), torch.randint(1, 5, (31,), generator=generator)
    counted = rule(Samples(values[None], counts), levels_of(4, kind))
    repeated = rule(Samples(values.repeat_interleave(counts)[None]), levels_of(4, kind))
    torch.testing.assert_close(counted, repeated, rtol=1e-5, atol=0)


def test_relative_errors_are_weighted_by_the_size_of_their_row():
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(50, generator=generator)
    sizes = torch.exp2(torch.randint(-2, 4, (50,), generator=generator).float())
    counts = torch.randint(1, 9, (50,), generator=generator)
    _, high = Lp(2.4, 50)(Samples(values[None], counts, sizes), levels_of(3))
    median = np.sort(np.repeat(sizes.numpy(), counts.numpy()))[(int(counts.sum()) - 1) // 2]
    weights = counts.double().numpy() * np.maximum(sizes.double().numpy(), median) ** -2.4
    row, ends = values.double().tolist(), (values.min().item(), values.max().item())
    errors = [brute_error(row, ends[0] * i / 50, ends[1] * i / 50, 3, "signed", 2.4, weights) for i in range(1, 51)]
    shrink = high.item() / ends[1]
    found = brute_error(row, ends[0] * shrink, ends[1] * shrink, 3, "signed", 2.4, weights)
    assert found == pytest.approx(min(errors), rel=1e-4)


def test_one_huge_token_does_not_set_the_range():
    tokens = torch.randn(200, 32, generator=torch.Generator().manual_seed(6))
    tokens[7] *= 300
    histogram = Histogram(tokens=True)
    histogram.update(tokens)
    levels = levels_of(8, "zero point")
    _, relative = Lp()(histogram.samples(), levels)
    _, absolute = Lp(relative=False)(histogram.samples(), levels)
    assert relative.item() < 30
    assert absolute.item() > 100


@pytest.mark.parametrize("percent", [55.5, 90.3, 99.1, 100.0])
@pytest.mark.parametrize("size", [7, 101])
def test_percentile_is_numpys(percent, size):
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    low, high = Percentile(percent)(Samples(values), levels_of(8, channels=3))
    expected = np.percentile(values.numpy(), percent, axis=1, method="inverted_cdf")
    mirrored = -np.percentile(-values.numpy(), percent, axis=1, method="inverted_cdf")
    assert high.tolist() == expected.tolist()
    assert low.tolist() == mirrored.tolist()


@pytest.mark.parametrize(("kind", "highest"), [("signed", 7), ("unsigned", 15)])
def test_lsq_starts_at_the_papers_step(kind, highest):
    values = torch.tensor([[-1.0, 2.0, 3.0, -0.5]]).abs() * (1 if kind == "unsigned" else -1)
    levels = levels_of(4, kind)
    step, _ = levels.fit(*LsqInit()(Samples(values), levels))
    assert step.item() == pytest.approx(2 * 1.625 / highest**0.5, rel=1e-6)


def test_minmax_is_the_extremes():
    low, high = MinMax()(Samples(torch.tensor([[-1.0, 5.0], [2.0, 3.0]])), levels_of(8, channels=2))
    assert (low.tolist(), high.tolist()) == ([-1.0, 2.0], [5.0, 3.0])


@pytest.mark.parametrize(
    ("name", "bits", "weights", "expected"),
    [
        ("auto", 8, True, MinMax()),
        ("auto", 16, True, MinMax()),
        ("auto", 7, True, Lp()),
        ("auto", 8, False, Lp()),
        ("percentile", 4, True, Percentile()),
        ("lsq", 8, True, LsqInit()),
        (Lp(3.0), 8, True, Lp(3.0)),
    ],
)
def test_rules_by_name(name, bits, weights, expected):
    assert range_rule(name, bits=bits, weights=weights) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: range_rule("mse", bits=8), "range='mse' is unknown; use 'auto', 'minmax', 'percentile', 'lp', 'lsq'"),
        (lambda: Lp(p=0), "p must be positive, candidates at least 2"),
        (lambda: Lp(candidates=1), "p must be positive, candidates at least 2"),
        (lambda: Percentile(50), "percent=50 is not an upper percentile; use a value above 50, up to 100"),
        (lambda: Percentile(100.5), "percent=100.5 is not an upper percentile"),
    ],
)
def test_errors(make, message):
    with pytest.raises(SpecError, match=message):
        make()
