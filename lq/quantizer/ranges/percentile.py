"""Percentile: clip the outermost share of the values on each side that has any."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.quantizer.ranges.rule import Levels, Samples


@dataclass(frozen=True)
class Percentile:
    """Between the ``100 - percent`` and the ``percent`` percentile.

    Args:
        percent: upper percentile, in (50, 100].
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise SpecError(f"percent={self.percent} is not an upper percentile; use a value above 50, up to 100")

    def __call__(self, samples: Samples, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return the two percentiles of each row, shape (C,) each."""
        ordered, order = samples.values.sort(dim=1)
        weight = torch.ones_like(ordered) if samples.counts is None else samples.counts[order]
        share = weight.cumsum(1, dtype=torch.float64) / weight.sum(1, keepdim=True, dtype=torch.float64)
        tail = 1 - self.percent / 100
        last = samples.values.shape[1] - 1
        low = (share <= tail).sum(1).clamp(max=last)
        high = (share < 1 - tail).sum(1).clamp(max=last)
        return ordered.gather(1, low[:, None])[:, 0], ordered.gather(1, high[:, None])[:, 0]
