r"""LSQ's starting step: ``s0 = 2 <|v|> / sqrt(Qp)`` (Esser et al., Learned Step Size Quantization, section 2.1).

Written as a range: the grid of step ``s0`` around the zero point the values' own extremes ask for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq.quantizer.ranges.rule import Levels, Samples


@dataclass(frozen=True)
class LsqInit:
    """Twice the mean magnitude over the root of the highest level."""

    def __call__(self, samples: Samples, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return the range of the grid with LSQ's first step, shape (C,) each."""
        size = samples.values.abs()
        mean = size.mean(1) if samples.counts is None else (size * samples.counts).sum(1) / samples.counts.sum()
        _, zero_point = levels.fit(samples.low, samples.high)
        highest = levels.top - zero_point
        step = 2 * mean / torch.sqrt(highest.clamp(min=0.5))
        return -zero_point * step, highest * step
