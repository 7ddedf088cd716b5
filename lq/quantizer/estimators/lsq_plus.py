r"""LSQ+: the offset of activations is learned too, ``dx^/dbeta = 1`` outside the grid and 0 inside.

The offset is ``beta = -z * s``. Source: Bhalgat et al., LSQ+: Improving low-bit quantization through learnable offsets
and better initialization, CVPRW 2020. Here the zero point ``z`` is learned and used rounded, with the
gradient passing straight through that rounding, ``dx^/dz = -s`` outside the grid: zero stays a level, so that padding
is exact and integer hardware can run what was trained (the paper folds a real-valued offset into the next layer's bias,
which padding breaks). Grids without a zero point of their own (weights, activations that are never negative) are LSQ's.
"""

from dataclasses import dataclass

from lq.quantizer.estimators.estimator import Part
from lq.quantizer.estimators.lsq import LSQ


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """Steps and zero points are learned."""

    @property
    def learns(self) -> frozenset[Part]:
        """Step and zero point."""
        return frozenset({"log2_step", "zero_point"})
