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

from torch import Tensor

from lq.errors import SpecError
from lq.estimators.lsq import LSQ

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
    changes_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 2:
            raise SpecError(f"delta={self.delta} is not in [0, 2): beyond, gradients would change their sign")

    def weigh(self, grad: Tensor, error: Tensor) -> Tensor:
        """The gradient, increased by ``delta * |grad| * error``."""
        return grad.addcmul_(grad.abs(), error, value=self.delta)


@dataclass(frozen=True)
class AdaptiveEWGS(LSQ):
    """EWGS with a strength that follows from each tensor or channel."""

    changes_gradients: ClassVar[bool] = True

    def weigh(self, grad: Tensor, error: Tensor) -> Tensor:
        """The gradient, weighed by the strength of each row."""
        along = grad.sign().mul_(error)
        variance = error.var(dim=1, correction=0, keepdim=True).clamp_(min=_LEAST_VARIANCE)
        taken = along.mul_(along.mean(dim=1, keepdim=True) / variance).clamp_(max=_LARGEST)
        return grad.addcmul_(grad, taken, value=-1.0)
