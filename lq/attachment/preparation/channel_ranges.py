"""Ranges of channels between two of their quantiles, over batches, in memory that does not grow.

Each channel has a histogram of bins that double their width sixteen times over: 16 for each power of two from 2^-20 to
2^20, for each sign (smaller values are zero, larger ones are in the last bin). Between the edges of a bin quantiles are
interpolated, so that they are exact to 1 % or so. Counts do not depend on the order of batches, and those of ranks are
summed.
"""

import torch
from torch import Tensor

from lq.quantizer.histogram import Reduce, raise_if_not_finite

_STEPS, _LOWEST, _OCTAVES = 16, -20, 40
_HALF = _STEPS * _OCTAVES
#: At most so many values are counted at once.
_BLOCK = 1 << 22


class ChannelRanges:
    """Counts values of each channel.

    Args:
        channels: number of channels C.
        dim: dimension of the tensors that holds them.
        name: what the tensor is called in messages.
    """

    def __init__(self, channels: int, dim: int, name: str) -> None:
        self.channels, self.dim, self.name = channels, dim, name
        self.counts: Tensor | None = None  # (C, 2 * _HALF + 1), from the lowest to the highest values
        self.sums = torch.zeros(2, channels, dtype=torch.float64)  # of the values and of their squares

    def update(self, x: Tensor) -> None:
        """Count the values of a tensor.

        Raises:
            DataError: if it has NaN or Inf.
        """
        rows = x.detach().movedim(self.dim, -1).reshape(-1, self.channels).float()
        if not bool(rows.isfinite().all()):
            raise_if_not_finite(rows, self.name)
        if self.counts is None:
            self.counts = torch.zeros(self.channels, 2 * _HALF + 1, dtype=torch.int64, device=x.device)
        self.sums += torch.stack([rows.sum(0), rows.square().sum(0)]).cpu()
        start = torch.arange(self.channels, device=x.device) * self.counts.shape[1]
        for block in rows.split(max(1, _BLOCK // self.channels)):
            mantissa, exponent = torch.frexp(block)  # 0.5 <= |mantissa| < 1, or 0
            within = (mantissa.abs() * 2 * _STEPS).floor().to(torch.int64) - _STEPS
            bins = ((exponent.to(torch.int64) - _LOWEST) * _STEPS + within + 1).clamp_(0, _HALF)
            bins = torch.where(mantissa == 0, 0, bins) * mantissa.sign().to(torch.int64) + _HALF + start
            self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def reduce(self, over_ranks: Reduce, device: torch.device) -> None:
        """Make these the counts of all ranks' values."""
        counts = self.counts
        if counts is None:
            counts = torch.zeros(self.channels, 2 * _HALF + 1, dtype=torch.int64, device=device)
        self.counts = over_ranks(counts.contiguous(), "sum")
        self.sums = over_ranks(self.sums.float().to(device), "sum").cpu().double()
        if not bool(self.counts.any()):
            self.counts = None

    @property
    def seen(self) -> bool:
        """Whether there were any values."""
        return self.counts is not None

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of each channel's values and mean of their squares, of shape (C,), float64."""
        counts = torch.zeros(self.channels, 1) if self.counts is None else self.counts
        mean, square = self.sums / counts.sum(1).clamp(min=1).cpu().double()
        return mean, square

    def quantiles(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The quantiles `low` and `high` of each channel, of shape (C,), float64.

        >>> ranges = ChannelRanges(2, dim=1, name="x")
        >>> ranges.update(torch.stack([torch.linspace(0, 1, 1001), torch.linspace(-4, 4, 1001)], 1))
        >>> [[round(float(value), 1) for value in end] for end in ranges.quantiles(0.1, 0.9)]
        [[0.1, -3.2], [0.9, 3.2]]
        """
        if self.counts is None:
            return torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        counts = self.counts.cpu().double()
        above = counts.cumsum(1)
        edges = _edges()
        found = []
        for share in (low, high):
            wanted = share * above[:, -1:]
            index = torch.searchsorted(above, wanted).clamp_(max=counts.shape[1] - 1)
            inside = counts.gather(1, index)
            part = 1 - (above.gather(1, index) - wanted) / inside.clamp(min=1)
            found.append((edges[index] + part.clamp(0, 1) * (edges[index + 1] - edges[index])).squeeze(1))
        return found[0], found[1]


def _edges() -> Tensor:
    """Edges of the bins; the bin of zero has none."""
    octaves = torch.arange(_OCTAVES).double() + _LOWEST
    within = 0.5 + torch.arange(_STEPS).double() / (2 * _STEPS)
    upper = torch.cat([(torch.exp2(octaves)[:, None] * within).flatten(), torch.exp2(octaves[-1:])])
    # bins below zero, that of zero between the two smallest values, bins above
    return torch.cat([-upper.flip(0), upper])
