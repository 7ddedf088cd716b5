r"""Learned step size: with ``v = x / s``, ``dx^/ds = round(v) - v`` inside the grid, ``low`` below, ``high`` above.

The gradient is multiplied by ``1 / sqrt(N * Qp)``, N values sharing the step and Qp the highest level. Source: Esser et
al., Learned Step Size Quantization, ICLR 2020, equations 3 to 5 and section 2.2. The step is learned as its logarithm,
so that it stays positive; an activation's N is that of one sample, so that it does not depend on the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.quantizer.estimators.estimator import Estimator, Part
from lq.quantizer.rounding import Bound


@dataclass(frozen=True)
class LSQ(Estimator):
    """Steps are learned."""

    @property
    def learns(self) -> frozenset[Part]:
        """The step."""
        return frozenset({"log2_step"})

    def gradient_scale(self, count: float, high: Bound) -> Bound:
        """The factor ``1 / sqrt(N * Qp)``."""
        if isinstance(high, Tensor):
            return torch.rsqrt(high.detach().clamp(min=0.5) * count)
        return 1 / math.sqrt(max(high, 0.5) * max(count, 1.0))
