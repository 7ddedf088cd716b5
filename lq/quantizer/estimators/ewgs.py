r"""Element-wise gradient scaling: ``g_x = g * (1 + delta * sign(g) * (v - round(v)))`` inside the grid, ``v = x / s``.

A value is moved further if the gradient would take it across the next threshold than if it moves towards its level.
Source: Lee et al., Network Quantization with Element-wise Gradient Scaling, CVPR 2021, equation 4 (there with the error
in units of the whole range and a delta from the Hessian). The adaptive form takes delta from the tensor itself, by
least squares of the gradient's sign on the error, for each step:
``g_x = g * (1 - min(0.99, delta * sign(g) * e))``, ``e = round(v) - v``, ``delta = mean(sign(g) * e) / var(e)``.
Source: the published code of GDNSQ (arXiv 2508.14004), where it helps at 1 bit. Steps are learned as in LSQ in both.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.quantizer.estimators.lsq import LSQ

_LARGEST = 0.99  # share of a gradient that may be taken away
_LEAST_VARIANCE = 1e-3


@dataclass(frozen=True)
class EWGS(LSQ):
    """Gradients weighed by the rounding error.

    Args:
        delta: strength, per step of rounding error; 0 is straight-through.

    Raises:
        SpecError: if `delta` is negative, or so large that gradients change sign.
    """

    delta: float = 0.01
    weighs: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 2:
            raise SpecError(f"delta={self.delta} is not in [0, 2): beyond, gradients would change their sign")

    @property
    def error_weight(self) -> float | None:
        """The strength."""
        return self.delta

    def weigh(self, grad: Tensor, error: Tensor) -> None:
        """Increase the gradient by ``delta * |grad| * error``."""
        grad.addcmul_(grad.abs(), error, value=self.delta)


@dataclass(frozen=True)
class AdaptiveEWGS(LSQ):
    """EWGS with a strength that follows from each tensor or channel."""

    weighs: ClassVar[bool] = True
    changes_gradients: ClassVar[bool] = True

    def weigh(self, grad: Tensor, error: Tensor) -> None:
        """Weigh the gradient by the strength of each row, which counts what is inside the grid."""
        sign = grad.sign()
        count = error.shape[1]
        along = torch.linalg.vecdot(sign, error).div_(count)
        inside = error.mul_(sign.abs())
        variance = torch.linalg.vecdot(inside, inside).div_(count).sub_(inside.mean(dim=1).square_())
        delta = along.div_(variance.clamp_(min=_LEAST_VARIANCE)).unsqueeze_(1)
        grad.addcmul_(grad, inside.mul_(sign).mul_(delta).clamp_(max=_LARGEST), value=-1.0)
