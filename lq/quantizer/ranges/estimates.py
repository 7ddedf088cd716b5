r"""Which few grids are worth a look: errors of all of them, estimated from a histogram of each row.

- `by_table`: rows whose grids have one zero point, or few. Histogram times table (`lq.quantizer.ranges.error_tables`).
- `by_parts`: grids with a zero point of 5 bits and more are too many. The error of one is the sum of what rounding
  costs at its step, as if it had no ends, and of what lies beyond each end, less the rounding that was counted there:
  ``sum_i |x_i - s round(x_i / s)|^p + sum_ends (sum_{x_i > e} |x_i - e|^p - s^p / (2^p (p + 1)) * #{x_i > e})``.

All estimates are of rows of one width, divided by the step of their widest grid.
"""

import torch
from torch import Tensor

from lq.quantizer.ranges import error_tables as tables
from lq.quantizer.ranges.direct import BLOCK
from lq.quantizer.ranges.rule import Levels

# Bins for each level, and at least: of rows that are long enough for the estimate alone to decide, and of others.
_BINS_OF_LONG, _BINS_OF_SHORT = (16, 2048), (8, 512)
#: Rows of so many values are long enough.
LONG = 512
# By parts: shrinks for each candidate, and neighbours of the best that are tried, to either side.
_FINER, _NEIGHBOURS = 3, 18
# Zero points that are tried first, evenly spaced, before those near the best.
_COARSE = 17
# Bins for what lies beyond an end, and places for ends; the error is interpolated between these.
_TAIL_BINS, _ENDS = 1024, 257


def bins_of(bits: int, length: int) -> int:
    """Number of bins for rows of a width and length."""
    per_level, least = _BINS_OF_LONG if length >= LONG else _BINS_OF_SHORT
    return max(least, per_level << bits)


def by_table(
    values: Tensor, levels: Levels, step: Tensor, zero: Tensor, weights: Tensor | None, p: float, n: int, count: int
) -> tuple[Tensor, Tensor]:
    """Zero points and shrinks of the `count` grids of least error, best first.

    Args:
        values: rows (C, N).
        levels: of the grids, all of one width.
        step: that of the widest grid of each row, (C,).
        zero: zero point of each row, (C,), where it is not free.
        weights: of the values, (N,); None: all count the same.
        p: exponent of the error.
        n: number of shrinks.
        count: how many grids of each row.

    Returns:
        Shape (C, count) each.
    """
    top, bins = int(levels.top[0]), bins_of(int(levels.bits[0]), values.shape[1])
    zeros = tuple(float(z) for z in range(top + 1)) if levels.zero_is_free else (float(zero[0]),)
    first, length = (-float(top), 2 * top) if levels.zero_is_free else (-zeros[0], top)
    table = _tensor(tables.grid_table(p, n, top, zeros, first, bins), values)
    held = histogram(values, step, first, bins / length, bins, weights)
    chosen = (held @ table).topk(min(count, table.shape[1]), largest=False).indices
    points = torch.tensor(zeros, dtype=values.dtype, device=values.device)
    return points[torch.div(chosen, n, rounding_mode="floor")], _shrink(chosen % n, n, values)


def by_parts(
    values: Tensor, levels: Levels, step: Tensor, weights: Tensor | None, p: float, n: int, count: int
) -> tuple[Tensor, Tensor]:
    """Like `by_table`, for grids whose zero point is free; shrinks may lie between those of the table."""
    top, bins = int(levels.top[0]), max(_TAIL_BINS, 16 << int(levels.bits[0]))
    sides = torch.cat([histogram(values, step * sign, 0.0, bins / top, bins, weights, below=False) for sign in (1, -1)])
    rounding = (sides[: len(values)] + sides[len(values) :]) @ _tensor(
        tables.rounding_table(p, n * _FINER, top, bins), values
    )
    tails = sides.unflatten(1, (_TAIL_BINS, -1)).sum(2) @ _tensor(tables.tail_table(p, top, _TAIL_BINS, _ENDS), values)

    def errors(zeros: Tensor, index: Tensor) -> Tensor:
        """Errors of zero points (C, Z) with the shrinks at `index` (C, I), (C, Z, I)."""
        shrink = _shrink(index, n * _FINER, values)
        counted = tables.mean_rounding_error(p) * shrink**p
        found = rounding.gather(1, index).unsqueeze(1).expand(-1, zeros.shape[1], -1).clone()
        for tail, steps in zip(tails.split(len(values)), (top - zeros, zeros), strict=True):
            at = (steps.unsqueeze(2) * shrink.unsqueeze(1)).mul_((_ENDS - 1) / top)
            power, number = (_interpolated(part, at.flatten(1)).view_as(at) for part in tail.split(_ENDS, 1))
            found += power.sub_(number.mul_(counted.unsqueeze(1)))
        return found

    rows, stride = len(values), -(-top // (_COARSE - 1))
    zeros = torch.arange(0, top + stride, stride, device=values.device).clamp(max=top).to(values.dtype)
    index = torch.arange(0, n * _FINER, _FINER, device=values.device)
    best = errors(zeros.expand(rows, -1), index.expand(rows, -1)).flatten(1).argmin(1, keepdim=True)
    around = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, device=values.device)
    index = (index[best % n] + around).clamp(0, n * _FINER - 1)
    near = torch.arange(1 - stride, stride, device=values.device)
    points = (zeros[torch.div(best, n, rounding_mode="floor")] + near).clamp(0, top)
    chosen = errors(points, index).flatten(1).topk(count, largest=False).indices
    index = index.gather(1, chosen % len(around))
    points = points.gather(1, torch.div(chosen, len(around), rounding_mode="floor"))
    return points, _shrink(index, n * _FINER, values)


def histogram(
    values: Tensor,
    step: Tensor,
    first: float,
    per_step: float,
    bins: int,
    weights: Tensor | None,
    *,
    below: bool = True,
) -> Tensor:
    """Rows (C, N) counted in bins, (C, bins).

    Args:
        values: rows (C, N).
        step: of the widest grid of each row, (C,).
        first: where the first bin begins, in steps.
        per_step: bins for each step.
        bins: how many there are; the last one counts what is above, too.
        weights: of the values, (N,); None: all count 1.
        below: whether the first bin counts what is below.

    >>> x = torch.tensor([[-1.0, 0.2, 3.9, 3.8]])
    >>> histogram(x, torch.tensor([2.0]), 0.0, 2.0, 4, None, below=False)
    tensor([[1., 0., 0., 2.]])
    """
    held = values.new_zeros(len(values), bins + 1)  # what is below comes first
    scale = (per_step / step).unsqueeze(1)
    width = max(1, BLOCK // len(values))
    parts = values.split(width, 1)
    for i, part in enumerate(parts):
        index = (part * scale).sub_(first * per_step - 1).clamp_(int(below), bins).to(torch.int64)
        source = torch.ones_like(part) if weights is None else weights.split(width)[i].expand_as(part)
        here = torch.zeros_like(held) if len(parts) > 1 else held  # float32 counts to 2**24 at a time
        here.scatter_add_(1, index, source)
        if here is not held:
            held += here
    return held[:, 1:]


def _interpolated(rows: Tensor, at: Tensor) -> Tensor:
    """Rows (C, J) at places (C, M) between 0 and J - 1."""
    index = at.to(torch.int64).clamp_(0, rows.shape[1] - 2)
    return torch.lerp(rows.gather(1, index), rows.gather(1, index + 1), at - index)


def _shrink(index: Tensor, n: int, like: Tensor) -> Tensor:
    """The shrinks at `index` of `error_tables.shrinks`."""
    return (n - index).to(like.dtype) / n


def _tensor(table: tables.Array, like: Tensor) -> Tensor:
    return torch.from_numpy(table).to(like)
