r"""L_p: the range whose grid is nearest to the values, ``argmin sum_i w_i * |Q(v_i) - v_i| ** p``.

The rule of BRECQ and QDrop with p = 2.4; p = 2 is the mean squared error. Candidates are shrinks of the min-max range,
with all zero points where these are free. The published codes round all values for each candidate. Here the values of
a row are counted in bins once for its width; one matrix product turns counts into errors of all candidates
(`lq.quantizer.ranges.estimates`), and the values themselves decide between the best few where that could matter. Short
rows, widths above 8 bits or between whole numbers, and steps that are powers of two are searched directly
(`lq.quantizer.ranges.direct`).

What deviates, for activations: an error counts relative to the size of its row, ``w = (max(rms, median rms)) ** -p``
with the root mean square of the token (or sample) the value comes from. A few huge tokens, as vision transformers have
them, would otherwise set the range of all others. On the ViT-Tiny, ResNet-20 and EfficientNet-Lite0 this was measured
on it is never clearly worse and often much better: at W8A8 the KL to the float ViT-Tiny falls from 0.14 to 0.03.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.quantizer.ranges.direct import BLOCK, DirectSearch, errors
from lq.quantizer.ranges.estimates import LONG, bins_of, by_parts, by_table
from lq.quantizer.ranges.rule import Levels, Samples

# Rows of fewer values are searched directly; so are rows with a free zero point below the second number.
_SHORT, _SHORT_WITH_ZERO = 64, 128
# With a free zero point, widths up to this have a table of all of them.
_TABLE_BITS = 4
# Between how many candidates the values decide, for rows of fewer values than a number; the longer, the better are
# estimates.
_DECIDE = ((LONG // 2, 4), (LONG, 2), (math.inf, 1))
_DECIDE_WITH_ZERO = ((4096, 8), (math.inf, 2))
# Values and bins that are worked on at a time.
_ROWS = 1 << 18
# Steps between candidates that are tried at the best zero point.
_BETWEEN = (-2 / 3, -1 / 3, 1 / 3, 2 / 3)


@dataclass(frozen=True)
class Lp:
    """The shrink of the min-max range with the least L_p error.

    Args:
        p: exponent of the error, above 0.
        candidates: number of shrinks tried, evenly spaced in (0, 1].
        relative: count errors relative to the size of their token or sample, where it is known.
    """

    p: float = 2.4
    candidates: int = 100
    relative: bool = True

    def __post_init__(self) -> None:
        if self.p <= 0 or self.candidates < 2:
            raise SpecError(f"Lp(p={self.p}, candidates={self.candidates}): p must be positive, candidates at least 2")

    def __call__(self, samples: Samples, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return the best range of each row, shape (C,) each."""
        values, weights = samples.values, samples.error_weights(self.p, relative=self.relative)
        if weights is not None:  # a value is counted once for each octave of sizes: add these up
            distinct, index = values[0].unique(return_inverse=True)
            weights = torch.zeros_like(distinct).index_add_(0, index, weights)
            values = distinct.expand(len(values), -1)
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        with torch.autocast(values.device.type, enabled=False):
            for bits in levels.bits.unique().tolist():  # rows of a width share their grids
                rows = (levels.bits == bits).nonzero()[:, 0]
                size = self._rows_at_a_time(float(bits), values.shape[1], levels)
                for block in rows.split(size):
                    some = values[block[0] : block[-1] + 1] if len(rows) == len(values) else values[block]
                    own = replace(levels, bits=levels.bits[block])
                    low[block], high[block] = self._best(some, low[block], high[block], own, weights)
        return low, high

    def _best(
        self, values: Tensor, low: Tensor, high: Tensor, levels: Levels, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The best range of rows of one width, given their ends."""
        bits, length = float(levels.bits[0]), values.shape[1]
        if bits == 0:
            return low, high
        if self._is_direct(bits, length, levels):
            return DirectSearch(self.p, self.candidates)(values, low, high, levels, weights)
        widest_step, zero = levels.fit(low, high)
        counts = _DECIDE_WITH_ZERO if levels.zero_is_free else _DECIDE
        count = next(count for end, count in counts if length < end)
        if levels.zero_is_free and bits > _TABLE_BITS:
            zeros, shrinks = by_parts(values, levels, widest_step, weights, self.p, self.candidates, count)
        else:
            zeros, shrinks = by_table(values, levels, widest_step, zero, weights, self.p, self.candidates, count)
        if not levels.zero_is_free:
            return self._decide(values, levels, shrinks * low[:, None], shrinks * high[:, None], weights)
        widest, last = ((high - low) / levels.top)[:, None], levels.top[:, None]  # 0 where all values are
        steps = shrinks * widest
        low, high = self._decide(values, levels, -zeros * steps, (last - zeros) * steps, weights)
        step, zero = levels.fit(low, high)
        between = torch.tensor((0.0, *_BETWEEN)).to(widest_step) / self.candidates
        steps = (step[:, None].where(widest > 0, 0.0) + between * widest).clamp(min=0)
        return self._decide(values, levels, -zero[:, None] * steps, last.sub(zero[:, None]) * steps, weights)

    def _rows_at_a_time(self, bits: float, length: int, levels: Levels) -> int:
        """So many that their values, or their bins, stay in a cache."""
        direct = self._is_direct(bits, length, levels)
        return max(1, BLOCK // max(length, 1)) if direct else max(1, _ROWS // max(length, bins_of(int(bits), length)))

    def _is_direct(self, bits: float, length: int, levels: Levels) -> bool:
        """Whether rows of this width and length are searched directly."""
        short = length < (_SHORT_WITH_ZERO if levels.zero_is_free else _SHORT)
        return short or bits % 1 > 0 or bits > 8 or levels.power_of_two

    def _decide(
        self, values: Tensor, levels: Levels, low: Tensor, high: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of a few ranges for each row, (C, n) each, the one with the least error."""
        best_low, best_high = low[:, 0], high[:, 0]
        if low.shape[1] == 1:
            return best_low, best_high
        least = torch.full_like(best_low, torch.inf)
        for now_low, now_high in zip(low.unbind(1), high.unbind(1), strict=True):
            now = errors(values, levels, now_low, now_high, self.p, weights)
            better = now < least
            least = torch.where(better, now, least)
            best_low, best_high = torch.where(better, now_low, best_low), torch.where(better, now_high, best_high)
        return best_low, best_high
