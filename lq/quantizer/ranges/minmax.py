"""Min-max: the range is that of the values. Nothing is clipped; one outlier widens every step."""

from dataclasses import dataclass

from torch import Tensor

from lq.quantizer.ranges.rule import Levels, Samples


@dataclass(frozen=True)
class MinMax:
    """From the smallest to the largest value."""

    def __call__(self, samples: Samples, levels: Levels) -> tuple[Tensor, Tensor]:
        """Return the extreme values of each row, shape (C,) each."""
        return samples.low, samples.high
