r"""What each grid of a family costs a value in each bin: the L_p errors of all grids are then one matrix product.

Rows that share a width also share their grids once their values are divided by the step of the widest one: levels lie
at ``s * (k - z)`` for ``k = 0 .. top`` with a shrink ``s`` and a zero point ``z``. A row becomes a histogram over bins
of that axis, and its errors are ``histogram @ table``. A table holds the mean of ``|Q(x) - x| ** p`` over each bin, by
the antiderivative, so that bins and levels cannot beat: for values spread evenly within bins there is no bias.
"""

from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def shrinks(candidates: int) -> Array:
    """The shrinks tried, widest first, evenly spaced in (0, 1]; shape (n,), float64."""
    return np.arange(candidates, 0, -1) / candidates


@lru_cache(maxsize=64)
def grid_table(p: float, candidates: int, top: int, zeros: tuple[float, ...], first: float, bins: int) -> Array:
    """Mean error of a value in each bin on each grid, (bins, zeros * candidates), float32.

    Args:
        p: exponent of the error.
        candidates: number of shrinks.
        top: highest code.
        zeros: zero points, in steps.
        first: where bins begin, in steps of the widest grid; they are `top` long, or twice that if it is ``-top``.
        bins: number of bins.

    >>> table = grid_table(2.0, 1, 1, (0.0,), 0.0, 2)  # levels 0 and 1, two bins of half a step
    >>> (12 * table).round(5).tolist()
    [[1.0], [1.0]]
    """
    last = top if first == -top else first + top
    edges = np.linspace(first, last, bins + 1)[:, None, None]
    scale = shrinks(candidates)
    sums = _antiderivative(edges / scale + np.array(zeros)[:, None], p, top)
    found = np.diff(sums, axis=0) * (scale ** (p + 1) * bins / (last - first))
    return found.reshape(bins, -1).astype(np.float32)


@lru_cache(maxsize=64)
def rounding_table(p: float, candidates: int, top: int, bins: int) -> Array:
    """Mean error of a value in each bin of [0, top] on grids without an end, (bins, candidates), float32."""
    scale = shrinks(candidates)
    sums = _antiderivative(np.linspace(0, top, bins + 1)[:, None] / scale, p, np.inf)
    return (np.diff(sums, axis=0) * (scale ** (p + 1) * bins / top)).astype(np.float32)


@lru_cache(maxsize=64)
def tail_table(p: float, top: int, bins: int, ends: int) -> Array:
    """Of a value in each bin of [0, top]: its error beyond each end, and whether it is beyond; (bins, 2 * ends)."""
    beyond = np.clip(np.linspace(0, top, bins + 1)[:, None] - np.linspace(0, top, ends), 0, None)
    parts = [np.diff(beyond ** (q + 1) / (q + 1), axis=0) * (bins / top) for q in (p, 0)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def mean_rounding_error(p: float) -> float:
    """Mean of ``|x - round(x)| ** p`` over all x.

    >>> mean_rounding_error(2.0) * 12
    1.0
    """
    return float(0.5**p / (p + 1))


def _antiderivative(code: Array, p: float, top: float) -> Array:
    """Integral from 0 of ``|clamp(round(x), 0, top) - x| ** p``; without the clamp if `top` is infinite."""
    level = np.round(code)
    if np.isfinite(top):
        level = np.clip(level, 0, top)
    distance = code - level
    return mean_rounding_error(p) * level + np.sign(distance) * np.abs(distance) ** (p + 1) / (p + 1)
