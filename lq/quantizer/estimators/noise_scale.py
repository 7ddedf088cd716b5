r"""Noise scale: quantization as ``q = f - alpha * r``, ``E|r|^2 = 1``, with ``alpha`` and the width learned.

A uniform grid of step ``s`` has the noise scale ``alpha = s / sqrt(12)``, and ``I_alpha = log2(range / s)`` is the
width in bits: the logarithm of how often the noise fits into what is represented. Both the step and the range are
learned, so that the width is. Gradients:

- to the values, straight through inside the grid;
- to the range, through the lowest and the highest level;
- to the step, the residual ``round(v) - v`` plus the noise of an independent one, ``s * sum(g * r) / sqrt(3)`` with
  ``r = +-1/2`` at random.

Source: Salishev, What We Do (not?) Know About Quantization; Salishev et al., GDNSQ (arXiv 2508.14004) and its published
code. Here the random sum is drawn at once, as one number of the same variance, ``|g|^2 / 12``, for each step instead of
one for each value: ``|g| * u`` with ``u`` uniform between -1/2 and 1/2, taken from the last ten bits of ``s * |g|``
itself. So there is no generator whose state would have to be kept, copied to devices or kept apart from the user's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lq.quantizer.estimators.estimator import Estimator, Part

_LAST_BITS = 1 << 10


@dataclass(frozen=True)
class NoiseScale(Estimator):
    """Steps and zero points are learned; widths too, where something holds them down (`lq.training.noise_scale`).

    Args:
        widths: whether widths are learned.
    """

    changes_gradients: ClassVar[bool] = True

    widths: bool = False

    @property
    def learns(self) -> frozenset[Part]:
        """Step and zero point, and on request the width."""
        return frozenset({"log2_step", "zero_point", "bits"} if self.widths else {"log2_step", "zero_point"})

    def noise(self, size: Tensor) -> Tensor | None:
        """``s * sum(g * r) / sqrt(3)`` over the values that share a step."""
        last = size.float().view(torch.int32).bitwise_and(_LAST_BITS - 1)
        return last.mul(1 / _LAST_BITS).sub_(0.5 - 0.5 / _LAST_BITS).mul_(size)
