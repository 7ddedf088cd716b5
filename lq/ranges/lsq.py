r"""LSQ's starting step: ``s0 = 2 <|v|> / sqrt(Qp)`` (Esser et al., Learned Step Size Quantization, section 2.1).

Written as a range: the grid of step ``s0`` around the zero point the values' own extremes ask for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq.ranges.rule import Levels


@dataclass(frozen=True)
class LsqInit:
    """Twice the mean magnitude over the root of the highest level."""

    def __call__(self, values: Tensor, counts: Tensor | None, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return the range of the grid with LSQ's first step, shape (C,) each."""
        if counts is None:
            mean = values.abs().mean(1)
        else:
            mean = (values.abs() * counts).sum(1) / counts.sum()
        _, zero_point = levels.fit(values.amin(1), values.amax(1))
        highest = levels.top - zero_point
        step = 2 * mean / torch.sqrt(highest.clamp(min=0.5))
        return -zero_point * step, highest * step
