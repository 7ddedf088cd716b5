r"""Dampening of oscillations: weights are drawn to their levels, ``lambda * sum ||Q(w) - clip(w)||^2``.

``Q(w)`` is a constant, ``clip(w)`` the float weight within the range of its grid, and the sum goes over all quantized
weights. Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, section 4.2. Its
gradient, ``2 * lambda * (clip(w) - Q(w))``, needs weights alone; beyond the range it is zero, to weights and to steps.
So it is added to the gradients that an optimizer is about to use, once for each of its steps: no graph is kept, and the
training step is not touched.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lq.quantizer.rounding import clamp_levels
from lq.training.quantized_weights import QuantizedWeight


@torch.no_grad()
def add_dampening(weights: Iterable[QuantizedWeight], strength: float, scale: float | Tensor = 1.0) -> Tensor | float:
    """Add the gradient of the loss to those of the weights, where they have one that is not sparse.

    Args:
        weights: quantized weights.
        strength: the factor ``lambda``.
        scale: factor that gradients have now, such as a loss scale.

    Returns:
        The loss, without ``lambda``.
    """
    losses: list[Tensor] = []
    for weight in weights:
        grad = weight.grad
        if grad is None:
            continue
        bounds = low, high, _ = weight.bounds()
        step = weight.step
        inside = clamp_levels(weight.split(weight.values).float() * step.reciprocal(), low, high)
        error = inside.sub_(weight.levels(bounds)).mul_(step)
        losses.append(torch.linalg.vector_norm(error).square_())
        weight.split(grad).add_(error.mul_(scale).to(grad.dtype), alpha=2 * strength)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else 0.0
