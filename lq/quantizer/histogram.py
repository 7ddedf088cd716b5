r"""A histogram that does not depend on the order of its data, so that ranks and batches add up exactly.

The bins split ``[-2**e, 2**e)`` evenly, where ``2**e`` is the smallest power of two above every value seen. When a
larger value comes, neighbouring bins merge: the grid of a smaller exponent is a refinement of that of a larger one.
Values are counted apart by the octave of their row's root mean square (rows are tokens or samples), so that a range
rule can weigh rows by size. Counts are integers: the result is a function of the rows alone, the same for one rank or
many, in any order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lq.errors import DataError
from lq.quantizer.ranges.rule import Samples

#: Combines a tensor over ranks: called with it and "sum", "min" or "max".
Reduce = Callable[[Tensor, str], Tensor]

BINS = 1 << 14  # a range that fills half of it still has 16 bins for each level of an 8-bit grid
_MIN_EXPONENT = -100
_MAX_OCTAVE = 128  # of float32; the sum of squares of such a row overflows
_BLOCK = 1 << 20


class Histogram:
    """Counts of the values of one tensor over many batches; memory does not grow with them.

    Args:
        name: of the tensor, for messages.
        tokens: rows are the vectors along the last dimension; otherwise they are the samples, along the first.

    >>> histogram = Histogram()
    >>> histogram.update(torch.tensor([[-1.0, 0.25, 3.0]]))
    >>> histogram.low, histogram.high, histogram.total
    (-1.0, 3.0, 3)
    """

    def __init__(self, name: str = "the tensor", *, tokens: bool = False) -> None:
        self.name = name
        self.tokens = tokens
        self.exponent = _MIN_EXPONENT
        self.octave = 0  # of the first row of counts
        self.counts: Tensor | None = None  # (octaves, BINS)
        self.low = math.inf
        self.high = -math.inf

    @property
    def total(self) -> int:
        """Number of values seen."""
        return 0 if self.counts is None else int(self.counts.sum())

    def count(self, x: Tensor) -> Tensor:
        """Add the values of `x` and return it."""
        self.update(x)
        return x

    def update(self, x: Tensor) -> None:
        """Add the values of `x`, of any shape.

        Raises:
            DataError: if it has NaN or Inf.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        rows = x.reshape(-1, x.shape[-1]) if self.tokens and x.ndim else x.reshape(x.shape[0] if x.ndim else 1, -1)
        size = torch.linalg.vector_norm(rows.float(), dim=1).div_(math.sqrt(rows.shape[1]))
        octaves = size.clamp_(min=2.0**_MIN_EXPONENT).log2_().round_().clamp_(max=_MAX_OCTAVE)
        ends = (*rows.aminmax(), *octaves.aminmax())
        low, high, first, last = torch.stack([end.double() for end in ends]).tolist()  # a GPU is waited for once
        if not math.isfinite(low) or not math.isfinite(high):
            raise_if_not_finite(x, self.name)
        octaves = octaves.to(torch.int32)
        self.low, self.high = min(self.low, low), max(self.high, high)
        counts = self._make_room(_exponent(max(-low, high)), int(first), int(last), x.device)
        scale = 2.0 ** (-self.exponent) * (BINS // 2)
        height = max(1, _BLOCK // rows.shape[1])
        for block, octave in zip(rows.split(height), (octaves - self.octave).split(height), strict=True):
            bins = (block.float() * scale).floor_().add_(BINS // 2).clamp_(max=BINS - 1).to(torch.int32)
            bins += octave[:, None] * BINS
            if bins.device.type == "cpu":
                counts += torch.bincount(bins.flatten(), minlength=counts.numel()).view_as(counts)
            else:  # elsewhere bincount reads its values first, which has to be waited for
                one = torch.ones((), dtype=counts.dtype, device=counts.device)
                counts.view(-1).index_add_(0, bins.flatten(), one.expand(bins.numel()))

    def reduce(self, over_ranks: Reduce, device: torch.device) -> None:
        """Make this the histogram of all ranks' values."""
        last = self.octave - 1 + (0 if self.counts is None else self.counts.shape[0])
        mine = [-self.low, self.high, float(self.exponent), -float(self.octave), float(last)]
        if self.counts is None:
            mine[3:] = [-math.inf, -math.inf]
        ends = over_ranks(torch.tensor(mine, dtype=torch.float64, device=device), "max").tolist()
        self.low, self.high = -ends[0], ends[1]
        if math.isinf(self.low):
            return  # no rank has seen a value
        counts = self._make_room(int(ends[2]), -int(ends[3]), int(ends[4]), device)
        self.counts = over_ranks(counts.contiguous(), "sum")

    def samples(self) -> Samples:
        """What was counted, as bin centres with their counts; the extremes are exact."""
        if self.counts is None:
            return Samples(torch.empty(1, 0))
        octave, held = self.counts.nonzero(as_tuple=True)
        width = 2.0**self.exponent / (BINS // 2)
        centres = (held - BINS // 2 + 0.5).mul_(width).clamp_(self.low, self.high)
        centres.index_fill_(0, held.argmin().view(1), self.low).index_fill_(0, held.argmax().view(1), self.high)
        return Samples(centres[None].float(), self.counts[octave, held], torch.exp2((octave + self.octave).float()))

    def _make_room(self, exponent: int, first: int, last: int, device: torch.device) -> Tensor:
        """The counts, after merging bins to span ``2**exponent`` and adding rows for octaves `first` to `last`."""
        if self.counts is None:
            self.exponent, self.octave = max(self.exponent, exponent), first
            self.counts = torch.zeros(last - first + 1, BINS, dtype=torch.int64, device=device)
        while self.exponent < exponent:
            merged = torch.zeros_like(self.counts)
            merged[:, BINS // 4 : 3 * BINS // 4] = self.counts.view(-1, BINS // 2, 2).sum(2)
            self.counts, self.exponent = merged, self.exponent + 1
        above = max(0, last - (self.octave + self.counts.shape[0] - 1))
        below = max(0, self.octave - first)
        if above or below:
            self.counts = torch.nn.functional.pad(self.counts, (0, 0, below, above))
            self.octave -= below
        return self.counts


def _exponent(largest: float) -> int:
    """The smallest e with ``largest < 2**e``: a value at the very end would change its bin when bins merge."""
    return max(_MIN_EXPONENT, math.frexp(largest)[1]) if largest > 0 else _MIN_EXPONENT


def raise_if_not_finite(x: Tensor, name: str) -> None:
    """Raise an error that names the tensor if `x` has NaN or Inf."""
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise DataError(
            f"{name} has {bad} NaN or Inf of {x.numel()} values; look for a too large learning rate, a bad checkpoint "
            "or bad input data before quantizing"
        )
