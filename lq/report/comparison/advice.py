"""What to try next with a layer, told by what was measured of it.

The part of the layer (its weight, its input, an operand) that loses most is named, with what may help: a step for each
channel, a range that clips less or more, the width that reaches 20 dB at 6 dB for each bit, leaving it in float.
"""

import math
from collections.abc import Sequence

from lq.report.comparison.closeness import Closeness
from lq.report.comparison.result import Part

#: SQNR, in dB, above which a layer by itself needs nothing.
GOAL = 20.0
# With all before it, a layer is called lost below this.
_LOST = 10.0
# Share of the squared error from clipped values, above which the range is called narrow; and below which it is wide.
_NARROW, _WIDE = 0.5, 0.01
# Ranges of heads that differ by a factor of more.
_UNLIKE = 4.0
# Bits give 20 log10(2) dB each.
_DECIBELS_OF_A_BIT = 20 * math.log10(2)


def advice(name: str, parts: Sequence[Part], alone: Closeness | None, together: Closeness | None) -> str:
    """What to try with a layer; empty: nothing.

    >>> weight = Part("fc.weight", True, 2, 8.0, 0.0, "lp", True)
    >>> advice("fc", [weight], Closeness(9.0, 0.9, 0.1), None)
    'fc.weight: 4 bits'
    """
    if alone is None or not parts:
        return ""
    if alone.sqnr >= GOAL:
        if together is None or together.sqnr >= _LOST:
            return ""
        wide = max(parts, key=lambda one: one.beyond)
        if wide.beyond > 1:
            return (
                f"{wide.name}: float values go {wide.beyond:.1f}-fold beyond what calibration saw: mend what comes "
                "before, or calibrate on more samples"
            )
        return "its input is lost already: mend what comes before"
    part = min(parts, key=lambda one: one.sqnr)
    tips = list(filter(None, [_granularity(part), _range(part), _width(part)]))
    if part.bits >= 8 or not tips:
        tips.append(f"exclude={name!r}")
    return f"{part.name}: {', or '.join(tips)}"


def _granularity(part: Part) -> str:
    if part.is_weight and not part.per_channel:
        return "a step for each channel (per_channel=True)"
    return ""


def _range(part: Part) -> str:
    if part.clipped > _NARROW:
        return "range='minmax', which clips less" if part.range != "minmax" else ""
    if part.clipped < _WIDE and part.range == "minmax" and part.bits < 8:
        return "range='lp', which clips outliers"
    return ""


def _width(part: Part) -> str:
    if part.bits >= 8:
        return ""
    wanted = min(math.ceil(part.bits) + max(math.ceil((GOAL - part.sqnr) / _DECIBELS_OF_A_BIT), 1), 8)
    heads = f" (its heads differ {part.heads:.0f}-fold in range)" if part.heads and part.heads > _UNLIKE else ""
    return f"{wanted} bits{heads}"
