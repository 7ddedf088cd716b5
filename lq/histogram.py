r"""A histogram that does not depend on the order of its data, so that ranks and batches add up exactly.

The bins split ``[-2**e, 2**e)`` evenly, where ``2**e`` is the smallest power of two that holds every value seen. When a larger value
comes, neighbouring bins merge: the grid of a smaller exponent is a refinement of that of a larger one. Counts are integers,
so the result is a function of the multiset of values alone: the same for one rank or many, in any order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Combines a tensor over ranks in place of ``torch.distributed``: takes the tensor and "sum", "min" or "max".
Reduce = Callable[[Tensor, str], Tensor]

BINS = 1 << 14  # a range that fills half of it still has 16 bins for each level of an 8-bit grid
_MIN_EXPONENT = -100


class Histogram:
    """Counts of the values of one tensor over many batches; memory does not grow with them.

    >>> histogram = Histogram()
    >>> histogram.update(torch.tensor([-1.0, 0.25, 3.0]))
    >>> histogram.low, histogram.high, histogram.total
    (-1.0, 3.0, 3)
    """

    def __init__(self) -> None:
        self.exponent = _MIN_EXPONENT
        self.counts: Tensor | None = None
        self.low = math.inf
        self.high = -math.inf

    @property
    def total(self) -> int:
        """Number of values seen."""
        return 0 if self.counts is None else int(self.counts.sum())

    def update(self, x: Tensor) -> None:
        """Add the values of `x` (any shape, finite)."""
        x = x.detach().float().flatten()
        if x.numel() == 0:
            return
        low, high = (float(end) for end in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(_exponent(max(-low, high)))
        scale = 2.0 ** (-self.exponent) * (BINS // 2)
        bins = (x * scale).floor_().add_(BINS // 2).clamp_(max=BINS - 1).to(torch.int64)
        counts = torch.bincount(bins, minlength=BINS)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def reduce(self, over_ranks: Reduce, device: torch.device) -> None:
        """Make this the histogram of all ranks' values."""
        ends = over_ranks(torch.tensor([-self.low, self.high, float(self.exponent)], device=device), "max")
        self.low, self.high = -float(ends[0]), float(ends[1])
        if math.isinf(self.low):
            return  # no rank has seen a value
        self._widen(int(ends[2]))
        counts = self.counts if self.counts is not None else torch.zeros(BINS, dtype=torch.int64)
        self.counts = over_ranks(counts.to(device), "sum")

    def values(self) -> tuple[Tensor, Tensor]:
        """Bin centres (1, N) with the exact extremes at both ends, and counts (N,), of the bins that hold values."""
        if self.counts is None:
            return torch.empty(1, 0), torch.empty(0)
        held = self.counts.nonzero()[:, 0]
        width = 2.0**self.exponent / (BINS // 2)
        centres = (held - BINS // 2 + 0.5).mul_(width)
        centres.clamp_(self.low, self.high)
        centres[0], centres[-1] = self.low, self.high
        return centres[None].float(), self.counts[held]

    def _widen(self, exponent: int) -> None:
        """Merge bins until they span ``2**exponent``."""
        while self.counts is not None and self.exponent < exponent:
            merged = torch.zeros_like(self.counts)
            merged[BINS // 4 : 3 * BINS // 4] = self.counts.view(-1, 2).sum(1)
            self.counts, self.exponent = merged, self.exponent + 1
        self.exponent = max(self.exponent, exponent)


def _exponent(largest: float) -> int:
    """The smallest e with ``largest <= 2**e``."""
    return max(_MIN_EXPONENT, math.ceil(math.log2(largest))) if largest > 0 else _MIN_EXPONENT
