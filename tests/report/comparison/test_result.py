"""Results of a comparison: table, CSV, JSON, plot; closeness and advice by hand."""

import csv
import math

import pytest
import torch

from lq.errors import DataError, WriteError
from lq.report.comparison import Closeness, Comparison, LayerComparison, Part
from lq.report.comparison.advice import advice
from lq.report.comparison.closeness import EQUAL, Tally, unpacked

PART = Part("a.weight", True, 4.0, 12.0, 0.1, "lp", True)
ROWS = (
    LayerComparison(
        "b", "Linear", 1, 2, (PART,), Closeness(8.0, 0.9, 0.1), Closeness(5.0, 0.8, 0.2), "a.weight: 6 bits"
    ),
    LayerComparison("a", "Conv2d", 0, 1, (PART,), Closeness(EQUAL, 1.0, 0.0), None),
)
FOUND = Comparison(ROWS, Closeness(5.0, 0.8, 0.2), 64, ("a note",))


def test_table():
    text = str(FOUND)
    assert text.index("\nb ") < text.index("\na ") and "equal" in text and "a note" in text and "SQNR 5.0 dB" in text
    assert "1 more layers" in str(FOUND.table(1)) and "Conv2d" not in str(FOUND.table(1))
    assert FOUND["a"] is ROWS[1]
    with pytest.raises(DataError, match="'c' was not compared"):
        FOUND["c"]


def test_files(tmp_path):
    FOUND.to_csv(tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["b", "a"] and float(rows[0]["alone_sqnr"]) == 8.0
    assert rows[1]["together_sqnr"] == "" and rows[0]["worst_part"] == "a.weight"
    text = FOUND.to_json(tmp_path / "c.json")
    assert (tmp_path / "c.json").read_text() == text and Comparison.from_json(text) == FOUND
    for bad in ("{}", "[1]", text.replace('"alone"', '"other"')):
        with pytest.raises(DataError, match="not a saved comparison"):
            Comparison.from_json(bad)
    with pytest.raises(WriteError):
        FOUND.to_csv(tmp_path / "none" / "c.csv")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    FOUND.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_closeness_does_not_depend_on_batches():
    torch.manual_seed(0)
    x = torch.randn(40, 30)
    y = x + 0.1 * torch.randn(40, 30)
    whole, parts = Tally(), Tally()
    whole.add(x, y)
    parts.add(x[:20], y[:20])
    parts.add(x[20:], y[20:])
    one, two = (unpacked(tally.packed())[0] for tally in (whole, parts))
    assert one.sqnr == pytest.approx(two.sqnr, abs=1e-6) and one.cosine == pytest.approx(two.cosine, abs=1e-6)
    assert one.sqnr == pytest.approx(20, abs=0.5)


def test_kl_divergence_by_hand():
    x, y = torch.arange(1024.0).reshape(1, -1), torch.arange(1024.0).reshape(1, -1) // 512 * 512
    tally = Tally()
    tally.add(x, y)
    low, high = 0.0, 1023.0  # one value lies at each end
    p, q = ([0.5] * 256 for _ in range(2))
    for counts, values in ((p, x), (q, y)):
        for value in values.flatten().tolist():
            counts[int(min((value - low) * 256 / (high - low), 255))] += 1
    total = sum(p)
    want = sum(a / total * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert unpacked(tally.packed())[0].kl == pytest.approx(want, rel=1e-3)


def test_equal_zero_and_lost_values():
    for x, y, sqnr, cosine in (
        (torch.ones(2, 3), torch.ones(2, 3), EQUAL, 1.0),
        (torch.zeros(2, 3), torch.zeros(2, 3), EQUAL, 1.0),
        (torch.ones(2, 3), torch.zeros(2, 3), 0.0, 0.0),
        (torch.ones(2, 3), -torch.ones(2, 3), -20 * math.log10(2), -1.0),
    ):
        tally = Tally()
        tally.add(x, y)
        found = unpacked(tally.packed())[0]
        assert found.sqnr == pytest.approx(sqnr) and found.cosine == pytest.approx(cosine)
    assert unpacked(Tally().packed()) == (None, 0, 0)


def part(sqnr=10.0, bits=4.0, weight=True, clipped=0.1, rule="lp", per_channel=True, **kwargs):
    return Part("x", weight, bits, sqnr, clipped, rule, per_channel, **kwargs)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([part()], "x: 6 bits"),
        ([part(19.9), part(8.0, 2.0)], "x: 4 bits"),
        ([part(per_channel=False)], "x: a step for each channel (per_channel=True), or 6 bits"),
        ([part(clipped=0.9)], "x: range='minmax', which clips less, or 6 bits"),
        ([part(clipped=0.0, rule="minmax")], "x: range='lp', which clips outliers, or 6 bits"),
        ([part(bits=8.0, weight=False)], "x: exclude='layer'"),
        ([part(weight=False, heads=9.0)], "x: 6 bits (its heads differ 9-fold in range)"),
    ],
)
def test_advice(parts, said):
    assert advice("layer", parts, Closeness(9.0, 0.9, 0.1), None) == said


def test_advice_where_nothing_is_wrong_or_something_before():
    fine, lost = Closeness(30.0, 1.0, 0.0), Closeness(3.0, 0.5, 1.0)
    assert advice("layer", [part()], fine, fine) == "" and advice("layer", [part()], None, None) == ""
    assert advice("layer", [part()], fine, lost) == "its input is lost already: mend what comes before"
    assert "float values go 3.0-fold beyond" in advice("layer", [part(beyond=3.0)], fine, lost)
