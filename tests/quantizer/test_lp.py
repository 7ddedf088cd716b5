"""The estimates of the L_p search: no more than 0.1 % above the least error that brute force finds."""

import numpy as np
import pytest
import torch

from lq.quantizer.ranges import Levels, Lp, Samples
from lq.quantizer.ranges import error_tables as tables
from lq.quantizer.ranges.estimates import histogram

KINDS = {"signed": (True, True), "unsigned": (True, False), "zero point": (False, True)}
BOUND = 1.001


def rows(kind, channels, length, tails=False):
    generator = torch.Generator().manual_seed(channels + length)
    values = torch.randn(channels, length, generator=generator)
    if tails:
        values *= torch.empty(channels, length).exponential_(generator=generator)
    if kind == "unsigned":
        return values.abs()
    return values + 0.3 * torch.randn(channels, 1, generator=generator) if kind == "zero point" else values


def error(values, step, zero, top, p, weights=None):
    """The L_p errors of rows on grids ``(code - zero) * step`` with codes 0 .. top, in float64."""
    x = values.double() / step[:, None]
    code = (x + zero[:, None]).round().clamp(0, top)
    powers = ((code - zero[:, None] - x).abs() * step[:, None]).pow(p)
    return powers.sum(1) if weights is None else powers @ weights


def least(values, bits, kind, p, weights=None, candidates=100):
    """The least error of all candidates, by brute force."""
    top = 2**bits - 1
    low, high = values.double().amin(1).clamp(max=0), values.double().amax(1).clamp(min=0)
    zeros = {"unsigned": [0.0], "signed": [0.5 if bits == 1 else 2.0 ** (bits - 1)]}.get(kind, range(top + 1))
    best = torch.full_like(low, torch.inf)
    for zero in map(float, zeros):
        unit = (high - low) / top if kind == "zero point" else high / (top - zero)
        unit = torch.maximum(unit, -low / zero) if kind == "signed" else unit
        for i in range(1, candidates + 1):
            point = torch.full_like(low, zero)
            best = torch.minimum(best, error(values, unit * i / candidates, point, top, p, weights))
    return best


def found(values, bits, kind, p, counts=None):
    levels = Levels(torch.full((len(values),), float(bits)), *KINDS[kind])
    step, zero = levels.fit(*Lp(p)(Samples(values, counts), levels))
    weights = None if counts is None else counts.double() / counts.sum()
    return error(values, step.double(), zero.double(), 2**bits - 1, p, weights)


@pytest.mark.parametrize(("channels", "length"), [(40, 100), (40, 300), (20, 768), (1, 30000)])
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_one_zero_point(kind, bits, tails, channels, length):
    values = rows(kind, channels, length, tails)
    assert found(values, bits, kind, 2.4).sum() < BOUND * least(values, bits, kind, 2.4).sum()


@pytest.mark.parametrize("p", [0.7, 2.0, 4.0])
@pytest.mark.parametrize("bits", [2, 5])
def test_other_exponents(bits, p):
    values = rows("signed", 20, 600)
    assert found(values, bits, "signed", p).sum() < BOUND * least(values, bits, "signed", p).sum()


@pytest.mark.parametrize(("channels", "length"), [(20, 150), (10, 800), (1, 5000)])
@pytest.mark.parametrize("bits", range(1, 7))
def test_a_free_zero_point(bits, channels, length):
    values = rows("zero point", channels, length)
    assert found(values, bits, "zero point", 2.4).sum() < BOUND * least(values, bits, "zero point", 2.4).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 6])
def test_counted_values(kind, bits):
    values = rows(kind, 1, 900)
    counts = torch.randint(1, 50, (900,), generator=torch.Generator().manual_seed(1))
    weights = counts.double() / counts.sum()
    assert found(values, bits, kind, 2.4, counts).sum() < BOUND * least(values, bits, kind, 2.4, weights).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_many_widths_are_those_of_each(kind):
    values, bits = rows(kind, 18, 700), torch.arange(18.0) % 9
    together = Lp()(Samples(values), Levels(bits, *KINDS[kind]))
    for i in range(18):
        alone = Lp()(Samples(values[i : i + 1]), Levels(bits[i : i + 1], *KINDS[kind]))
        torch.testing.assert_close([end[i] for end in together], [end[0] for end in alone], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 5])
def test_steps_that_are_powers_of_two(bits):
    values = rows("signed", 20, 700)
    levels = Levels(torch.full((20,), float(bits)), True, True, power_of_two=True)
    step, zero = levels.fit(*Lp()(Samples(values), levels))
    best = torch.stack(
        [
            error(values, torch.full((20,), 2.0**k, dtype=torch.float64), zero.double(), 2**bits - 1, 2.4)
            for k in range(-12, 4)
        ]
    ).amin(0)
    assert error(values, step.double(), zero.double(), 2**bits - 1, 2.4).sum() < BOUND * best.sum()


@pytest.mark.parametrize("bits", [3.4, 16.0])
def test_widths_without_tables(bits):
    values = rows("zero point", 2, 600)
    levels = Levels(torch.full((2,), bits), False, True)
    low, high = Lp(candidates=20)(Samples(values), levels)
    assert (low < 0).all() and (high > 0).all()
    if bits == 16:
        torch.testing.assert_close(levels.dequantized(values, *levels.fit(low, high)), values, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_range(kind):
    for bits in range(9):
        levels = Levels(torch.full((3,), float(bits)), *KINDS[kind])
        assert not torch.cat(Lp()(Samples(torch.zeros(3, 200)), levels)).any()


@pytest.mark.parametrize("p", [0.7, 2.4])
def test_tables_hold_mean_errors(p):
    table = tables.grid_table(p, 4, 7, (2.0, 3.0), -7.0, 28).reshape(28, 2, 4)
    for k, z, i in ((0, 0, 0), (9, 1, 2), (14, 0, 3), (20, 1, 1), (27, 1, 0)):
        x = -7 + (k + (np.arange(100_000) + 0.5) / 100_000) / 2
        shrink, zero = tables.shrinks(4)[i], (2.0, 3.0)[z]
        rounded = (np.clip(np.round(x / shrink + zero), 0, 7) - zero) * shrink
        assert table[k, z, i] == pytest.approx(np.mean(np.abs(rounded - x) ** p), rel=1e-4)
    rounding = tables.rounding_table(p, 4, 7, 14)
    x = (5 + (np.arange(100_000) + 0.5) / 100_000) / 2
    assert rounding[5, 1] == pytest.approx(np.mean(np.abs(np.round(x / 0.75) * 0.75 - x) ** p), rel=1e-4)
    tail = tables.tail_table(p, 7, 14, 8)
    assert tail[5, 2] == pytest.approx(np.mean(np.clip(x - 2, 0, None) ** p), rel=1e-4)
    assert tail[3, 8:].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_histograms_count_every_value():
    values = rows("signed", 3, 200_000)
    unit = values.abs().amax(1) / 8
    counts = histogram(values, unit, -8.0, 4.0, 64, None)
    expected = [np.histogram((row / u).numpy(), np.linspace(-8, 8, 65))[0] for row, u in zip(values, unit, strict=True)]
    assert counts.sum(1).tolist() == [200_000] * 3
    assert np.abs(counts.numpy() - np.array(expected)).sum() <= 6  # values next to an edge
