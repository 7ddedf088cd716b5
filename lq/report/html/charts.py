"""Charts as SVG text: columns, lines and heat maps, in the colours of the page (classes of its style sheet).

All are 480 units wide, so that their text can be read on a phone, and say in a ``<title>`` what is under the pointer.
"""

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 480, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 30, 38

#: Points of a line: x, y; None: nothing there.
Points = Sequence[tuple[float, float | None]]


def columns(
    values: Sequence[float], titles: Sequence[str], *, dots: Sequence[float | None] = (), label: str = ""
) -> str:
    """A column for each value, from zero, and a dot for each of other values.

    Args:
        values: heights.
        titles: what each is.
        dots: other values at the same places.
        label: of the axis.
    """
    most = max([*values, *(dot for dot in dots if dot is not None), 1e-12])
    ticks = _ticks(0.0, most)
    scale = _Scale(0.5, max(len(values), 1) + 0.5, 0.0, ticks[-1])
    width = max((_WIDTH - _LEFT - _RIGHT) / max(len(values), 1), 0.5)
    parts = [_axes(scale, ticks, label, "layer")]
    for index, (value, title) in enumerate(zip(values, titles, strict=True)):
        x, y = scale.x(index + 0.5), scale.y(value)
        parts.append(
            f'<rect class="a" x="{x + 0.1 * width:.1f}" y="{y:.1f}" width="{0.8 * width:.1f}" '
            f'height="{scale.y(0) - y:.1f}"><title>{escape(title)}</title></rect>'
        )
    for index, dot in enumerate(dots):
        if dot is not None:
            radius = min(max(0.3 * width, 1.2), 4)
            parts.append(f'<circle class="b" cx="{scale.x(index + 1):.1f}" cy="{scale.y(dot):.1f}" r="{radius:.1f}"/>')
    return _svg(parts)


def lines(
    series: dict[str, Points], *, log: bool = False, label: str = "", below: str = "", marked: bool = False
) -> str:
    """A line for each series, with a legend if there are several.

    Args:
        series: points by name.
        log: whether the vertical axis is logarithmic.
        label: of the vertical axis.
        below: of the horizontal one.
        marked: whether points are dots, too.
    """
    shown = {
        name: [(x, y) for x, y in points if y is not None and (y > 0 or not log)] for name, points in series.items()
    }
    every = [point for points in shown.values() for point in points]
    if not every:
        return ""
    low, high = min(y for _, y in every), max(y for _, y in every)
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    scale = _Scale(min(x for x, _ in every), max(x for x, _ in every), ticks[0], ticks[-1], log=log)
    parts = [_axes(scale, ticks, label, below)]
    for index, (name, points) in enumerate(shown.items()):
        style = "abcde"[index % 5]
        path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {style}" points="{path}"><title>{escape(name)}</title></polyline>')
        if marked or len(points) == 1:
            radius = 5 if len(points) == 1 else 2.5
            parts += [
                f'<circle class="{style}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="{radius}">'
                f"<title>{escape(name)}: {_short(y)}</title></circle>"
                for x, y in points
            ]
    return _svg(parts) + (_legend(list(shown)) if len(shown) > 1 else "")


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], columns_: Sequence[str], label: str = "") -> str:
    """A cell for each value, the more coloured the greater its logarithm; one row for each name.

    Args:
        rows: names and values.
        columns_: names of columns.
        label: what the rows are.
    """
    positive = [math.log10(v) for _, values in rows for v in values if v > 0]
    low, high = (min(positive), max(positive)) if positive else (0.0, 1.0)
    height = min(max(240 / max(len(rows), 1), 2.0), 18.0)
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(columns_), 1)
    top = 6
    bottom = top + height * len(rows)
    middle = (top + bottom) / 2
    parts = [f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)">{escape(label)}</text>']
    for index, (name, values) in enumerate(rows):
        for place, value in enumerate(values):
            share = (math.log10(value) - low) / max(high - low, 1e-9) if value > 0 else 0.0
            dark = f"opacity:{0.06 + 0.94 * share:.2f}"
            parts.append(
                f'<rect class="heat" x="{_LEFT + place * width:.1f}" y="{top + index * height:.1f}" '
                f'width="{width - 1:.1f}" height="{max(height - 0.5, 1):.1f}" style="{dark}">'
                f"<title>{escape(name)}, {escape(columns_[place])}: {_short(value)}</title></rect>"
            )
    parts += [
        f'<text class="tick middle" x="{_LEFT + (i + 0.5) * width:.1f}" y="{bottom + 16:.0f}">{escape(name)}</text>'
        for i, name in enumerate(columns_)
    ]
    ends = _short(10**low), _short(10**high)
    key = f'<p class="legend"><span>{ends[0]}</span><i class="heat"></i><span>{ends[1]}</span></p>' if positive else ""
    return _svg(parts, bottom + 26) + key


class _Scale:
    """From values to places."""

    def __init__(self, left: float, right: float, low: float, high: float, *, log: bool = False) -> None:
        self.left, self.right = (left, right) if right > left else (left - 0.5, left + 0.5)
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        place = (math.log10(value) if self.log else value) - self.low
        share = place / (self.high - self.low) if self.high > self.low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale, ticks: Sequence[float], label: str, below: str = "") -> str:
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{y + 4:.1f}">{_short(tick)}</text>')
    if below:
        for value in _inner_ticks(scale.left, scale.right):
            place = f'x="{scale.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 15}"'
            parts.append(f'<text class="tick middle" {place}>{_short(value)}</text>')
        parts.append(f'<text class="label" x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}">{escape(below)}</text>')
    if label:
        parts.append(f'<text class="tick start" x="4" y="14">{escape(label)}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], height: float = _HEIGHT) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    keys = "".join(f'<span><i class="{"abcde"[i % 5]}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around a range."""
    span = high - low or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * size for m in (1, 2, 5, 10) if span / (m * size) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _inner_ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers within a range; whole ones where the range is one of steps, units or layers."""
    known = [tick for tick in _ticks(low, high) if low <= tick <= high]
    whole = [tick for tick in known if tick == int(tick)]
    return whole or known or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = -(-(last - first) // 5)
    return [10.0**power for power in range(first, last + step, step)]


def _short(value: float) -> str:
    """A number in few letters.

    >>> _short(0.00012), _short(1500.0), _short(0.25)
    ('1.2e-4', '1500', '0.25')
    """
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value:.4g}"
