r"""Losses of reconstruction: how far the output of a quantized unit is from that of the float one.

All but `KLLoss` are sums over channels and means over the rest, as the published codes of AdaRound, BRECQ and QDrop
have them, so that lambda of the rounding penalty means the same for all. Channels are dimension 1 of images (N, C, H,
W), the last dimension elsewhere. Losses that look at the network behind the unit have files of their own:
`lq.reconstruction.aph`, `dplr`, `global_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.aph import APHLoss
from lq.reconstruction.dplr import DPLRLoss
from lq.reconstruction.global_loss import GlobalLoss
from lq.reconstruction.objective import NetworkLoss, channels_of, weighted_error
from lq.structure.outputs import kl_divergence

#: From output, target and (for Fisher) weights to a scalar; or one that looks at the network behind the unit.
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor] | NetworkLoss


@dataclass(frozen=True)
class LpLoss:
    """``mean |z - z~|^p``, summed over channels; p = 2 is the squared error."""

    p: float = 2.0
    #: Whether it needs the squared gradient of the network's loss.
    weighted = False

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise SpecError(f"LpLoss(p={self.p}): the exponent must be positive")

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss."""
        if self.p == 2:
            return _squared(output, target)
        return (output.float() - target.float()).abs().pow(self.p).mean() * channels_of(output)


@dataclass(frozen=True)
class RelativeLoss:
    """The squared error; that of tokens, (N, T, C), relative to the variance of each token of the float network.

    What reads the output of a transformer's block is a layer norm, which divides a token by its deviation. Without
    that, a few tokens with massive activations are all that the squared error sees. Weights of tokens have a mean of 1;
    a tenth of the median variance is added to each, so that tokens of no variance do not weigh without limit.
    """

    weighted = False

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss."""
        if output.ndim != 3:
            return _squared(output, target)
        variance = target.float().var(-1, correction=0, keepdim=True)
        weight = 1 / (variance + 0.1 * variance.median()).clamp(min=1e-12)
        error = (output.float() - target.float()).square() * (weight / weight.mean())
        return error.mean() * channels_of(output)


@dataclass(frozen=True)
class FisherLoss:
    """``mean (z - z~)^2 * g^2``, summed over channels, with g the gradient of the log-likelihood at the float output.

    BRECQ's objective, the diagonal of the Fisher information in place of the Hessian (Li et al., BRECQ, ICLR 2021,
    equation 10); see `lq.reconstruction.fisher` for the labels. Deviates: the weights of a unit are scaled to a mean of
    1.
    """

    weighted = True

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss."""
        return weighted_error(output, target, weights)


@dataclass(frozen=True)
class KLLoss:
    """``KL(softmax(z) || softmax(z~))``, for units whose output is the network's logits, (N, C) or (N, C, H, W)."""

    temperature: float = 1.0
    weighted = False

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss."""
        if output.ndim == 4:
            output, target = output.movedim(1, -1), target.movedim(1, -1)
        return kl_divergence(output, target, self.temperature)


_NAMED: dict[str, Callable[[], Loss]] = {
    "relative": RelativeLoss,
    "mse": LpLoss,
    "fisher": FisherLoss,
    "kl": KLLoss,
    "aph": APHLoss,
    "dplr": DPLRLoss,
    "global": GlobalLoss,
}


def loss_of(loss: "str | Loss") -> Loss:
    """The loss itself, or the one of that name.

    >>> loss_of("mse")
    LpLoss(p=2.0)
    """
    if not isinstance(loss, str):
        return loss
    if loss not in _NAMED:
        raise SpecError(f"loss={loss!r} is unknown; use {', '.join(map(repr, _NAMED))} or a loss object")
    return _NAMED[loss]()


def _squared(output: Tensor, target: Tensor) -> Tensor:
    """The squared error; one pass over memory each way, where three operations would take four."""
    return F.mse_loss(output.float(), target.float()) * channels_of(output)
