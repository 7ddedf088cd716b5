"""Charts: values end up where they should, and odd values do no harm."""

import re
from xml.etree import ElementTree

import pytest

from lq.report.html.charts import _inner_ticks, _log_ticks, _ticks, columns, heat_map, lines


def parsed(text):
    return ElementTree.fromstring(re.sub(r"<p class=.*", "", text))


def test_columns_stand_on_zero():
    root = parsed(columns([2.0, 4.0, 8.0], ["a", "b", "c"], dots=[8.0, None, 4.0]))
    heights = [float(rect.get("height")) for rect in root.iter("rect")]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01) and heights[2] / heights[0] == pytest.approx(
        4, rel=0.01
    )
    assert [title.text for title in root.iter("title")] == ["a", "b", "c"]
    assert len(list(root.iter("circle"))) == 2


def test_lines_rise_where_values_do():
    root = parsed(lines({"up": [(0, 1.0), (1, 10.0), (2, 100.0)]}, log=True))
    ys = [float(point.split(",")[1]) for point in next(root.iter("polyline")).get("points").split()]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2) and ys[0] > ys[2]


@pytest.mark.parametrize("log", [False, True])
def test_odd_values(log):
    assert lines({"none": []}, log=log) == "" and lines({"gone": [(0, None)]}, log=log) == ""
    for values in ([5.0], [5.0, 5.0], [1e-30, 1e30], [0.0, 1.0]):
        text = lines({"x": list(enumerate(values))}, log=log)
        assert "nan" not in text and "inf" not in text
    assert "nan" not in columns([0.0, 0.0], ["a", "b"]) and columns([], [])


def test_columns_stand_over_their_numbers():
    root = parsed(columns([1.0] * 5, list("abcde"), dots=[None, None, 1.0, None, None]))
    bars = [float(rect.get("x")) + float(rect.get("width")) / 2 for rect in root.iter("rect")]
    numbers = {text.text: float(text.get("x")) for text in root.iter("text") if text.get("y") == "213"}
    assert [numbers[str(i)] for i in (1, 3, 5)] == pytest.approx([bars[0], bars[2], bars[4]], abs=0.2)
    assert float(next(root.iter("circle")).get("cx")) == pytest.approx(bars[2], abs=0.2)


def test_heat_maps_say_what_their_colours_are():
    text = heat_map([("a", [2.0, 0.004])], ["1b", "2b"])
    assert '<span>0.004</span><i class="heat"></i><span>2</span>' in text
    assert "legend" not in heat_map([("a", [0.0])], ["1b"])


def test_heat_maps():
    root = parsed(heat_map([("a", [1.0, 0.01]), ("b", [0.0, 0.1])], ["1b", "2b"]))
    dark = [float(rect.get("style").partition(":")[2]) for rect in root.iter("rect")]
    assert dark[0] == 1.0 and dark[1] == dark[2] == 0.06 and 0.4 < dark[3] < 0.6


def test_ticks():
    assert _ticks(0, 8) == [0, 2, 4, 6, 8]
    assert _inner_ticks(23, 69) == [30, 40, 50, 60] and _inner_ticks(0.5, 16.5) == [5, 10, 15]
    assert _inner_ticks(0.5, 3.5) == [1, 2, 3]  # half a layer is none
    assert _inner_ticks(0.11, 0.18) == [0.12, 0.14, 0.16, 0.18] and _inner_ticks(1, 1.01)
    assert _log_ticks(0.02, 30) == [0.01, 0.1, 1.0, 10.0, 100.0]
