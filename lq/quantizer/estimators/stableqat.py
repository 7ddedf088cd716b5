r"""StableQAT: ``g_x = g * (2 / (1 + sqrt(2) * pi * A * cos(pi * (v + round(v)))) - 1)`` inside the grid, ``v = x / s``.

The steps of rounding, turned by 45 degrees, are a triangle wave; its first harmonic, of amplitude A, turned back has
this slope. Source: Chen et al., StableQAT: Stable Quantization-Aware Training at Ultra-Low Bitwidths (arXiv
2601.19320), and its published code (``models/utils_quant.py``), where ``round(v)`` is the hard one, ``A = 0.21``, and
the gradient to the step is LSQ's.

With ``k = sqrt(2) * pi * A`` and ``e = v - round(v)`` the factor is ``(1 - k cos(pi e)) / (1 + k cos(pi e))``. For A =
0.21 it is between 0.035 on a level, ``(1 - k) / (1 + k)``, and 1 halfway between two, and 0.302 on average over a cell,
``(4 / pi) * arccos(k) / sqrt(1 - k^2) - 1``: values near their levels hardly move, those near a threshold move as
straight through. A = 0 is straight-through; from ``A = 1 / (sqrt(2) * pi)`` on the factor would be negative.

The published code quantizes weights alone. Behind each activation a gradient would shrink to a third, from layer to
layer: activations have the gradients of LSQ here, unless `activations` asks for the same.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lq.errors import SpecError
from lq.quantizer.estimators.estimator import Estimator
from lq.quantizer.estimators.lsq import LSQ

_LARGEST = 1 / (math.sqrt(2) * math.pi)


@dataclass(frozen=True)
class StableQAT(LSQ):
    """Steps are learned; gradients to weights grow with the distance from the level.

    Args:
        amplitude: of the harmonic, A; 0 is LSQ.
        activations: whether gradients to activations are weighed too.

    Raises:
        SpecError: if `amplitude` is negative, or so large that gradients change sign.
    """

    amplitude: float = 0.21
    activations: bool = False
    weighs: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.amplitude < _LARGEST:
            raise SpecError(
                f"amplitude={self.amplitude} is not in [0, {_LARGEST:.4f}): beyond, gradients would change their sign"
            )

    @property
    @override
    def of_activations(self) -> Estimator:
        """LSQ, unless activations are to be weighed too."""
        return self if self.activations else LSQ()

    @override
    def weigh(self, grad: Tensor, error: Tensor) -> None:
        """Multiply by the factor; the cosine of ``pi * (v + round(v))`` is that of pi times the error."""
        factor = error.mul_(math.pi).cos_().mul_(self.amplitude / _LARGEST).add_(1.0).reciprocal_()
        grad.mul_(factor.mul_(2.0).sub_(1.0))
