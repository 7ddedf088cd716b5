"""The L_p search that rounds all values for each candidate: for what tables do not cover, and to check them.

All rows go through each candidate at once. Two-sided ranges with a zero point are searched one end at a time (high,
low, high, low), then by their step for each zero point nearby, instead of on a plane. Every seventh of 100 candidates
is tried before the neighbours of the best.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.quantizer.ranges.rule import Levels

#: Values that are worked on at a time: they should stay in a cache.
BLOCK = 1 << 17

# Zero points tried on either side of the one that the search of the ends has found: all that 2 bits have.
_ZEROS = 3


def errors(values: Tensor, levels: Levels, low: Tensor, high: Tensor, p: float, weights: Tensor | None) -> Tensor:
    """``sum_i w_i * |Q(v_i) - v_i| ** p`` of rows (C, N) on the grids of ranges (C,); shape (C,)."""
    step, zero = levels.fit(low, high)
    width = max(1, BLOCK // max(len(values), 1))
    buffer = values.new_empty(len(values), min(width, values.shape[1]))
    found = torch.zeros_like(low)
    for start in range(0, values.shape[1], width):
        part = values[:, start : start + width]
        distance = levels.dequantized(part, step, zero, out=buffer[:, : part.shape[1]]).sub_(part).abs_()
        powers = distance.square_() if p == 2 else distance.log2_().mul_(p).exp2_()  # twice as fast as pow
        found += powers.sum(1) if weights is None else powers @ weights[start : start + width]
    return found


@dataclass(frozen=True)
class DirectSearch:
    """The best ranges of rows, by their errors on each candidate.

    Args:
        p: exponent of the error.
        candidates: number of shrinks, evenly spaced in (0, 1].
    """

    p: float
    candidates: int

    def __call__(
        self, values: Tensor, low: Tensor, high: Tensor, levels: Levels, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the best range of each row.

        Args:
            values: rows, (C, N).
            low: smallest value of each, at most 0; (C,).
            high: largest value of each, at least 0; (C,).
            levels: of the grids.
            weights: of the values, (N,); None: all count the same.
        """

        def error(low: Tensor, high: Tensor) -> Tensor:
            return errors(values, levels, low, high, self.p, weights)

        if not levels.zero_is_free:
            shrink = self._search(lambda s: error(s * low, s * high), like=low)
            return shrink * low, shrink * high
        best_low, best_high = low, high
        for _ in range(2):
            best_high = self._search(lambda s: error(best_low, s * high), like=low) * high  # noqa: B023
            best_low = self._search(lambda s: error(s * low, best_high), like=low) * low  # noqa: B023
        return self._best_zero(low, high, best_low, best_high, levels, error)

    def _best_zero(
        self,
        low: Tensor,
        high: Tensor,
        best_low: Tensor,
        best_high: Tensor,
        levels: Levels,
        error: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The best step for each zero point near the one found: one end at a time cannot move both past a level."""
        least, top = error(best_low, best_high), levels.top
        widest = (high - low) / top.clamp(min=1)
        found = levels.fit(best_low, best_high)[1]
        for distance in range(-_ZEROS, _ZEROS + 1):
            zero = (found + distance).clamp(min=0).minimum(top)
            step = self._search(lambda s: error(-zero * s * widest, (top - zero) * s * widest), like=low) * widest  # noqa: B023
            now = error(-zero * step, (top - zero) * step)
            better = now < least
            least = torch.where(better, now, least)
            best_low = torch.where(better, -zero * step, best_low)
            best_high = torch.where(better, (top - zero) * step, best_high)
        return best_low, best_high

    def _search(self, error: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """The shrink of least `error` for each row, all together: a coarse search, then a fine one near its best."""
        stride = max(1, math.isqrt(self.candidates // 2))
        best = torch.full_like(like, float(self.candidates))
        least = torch.full_like(like, torch.inf)

        def consider(candidate: Tensor) -> None:
            nonlocal best, least
            now = error(candidate / self.candidates)
            better = now < least
            best, least = torch.where(better, candidate, best), torch.where(better, now, least)

        for i in range(self.candidates, 0, -stride):
            consider(torch.full_like(like, float(i)))
        centre = best
        for offset in range(stride - 1, -stride, -1):
            if offset:
                consider((centre + offset).clamp(1, self.candidates))
        return best / self.candidates
