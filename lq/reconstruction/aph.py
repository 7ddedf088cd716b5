r"""APH: squared errors of a unit's output, weighed by how much the network's divergence curves there.

``H = mean over samples of |dKL/dz(z + e r) - dKL/dz(z - e r)| / 2e``, loss ``mean(H * (z - z~)^2)``, summed over
channels. KL is that of the float network's probabilities, of logits over a temperature, against those with another
output of the unit; its gradient at z is 0, so that the difference is that of the curvature times r. H has one number
for each element of a sample, the same for all samples, scaled to a mean of 1.

Source: Wu et al., APHQ-ViT, CVPR 2025: the mean over samples, temperature 20. Deviates: there, 1e-6 is added to all
elements at once. A layer norm takes away what all channels of a token have in common, so that in a transformer what is
left of that is the rounding error of float32. Here each element is moved up or down (r: a sign, drawn by seed and the
same for all samples), by a hundredth of the root mean square of the sample's z, and H does not depend on that size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.objective import NetworkLoss, Objective, OfOutput, weighted_error

if TYPE_CHECKING:
    from lq.reconstruction.behind import Behind
    from lq.reconstruction.flow import SampleLayout


@dataclass(frozen=True)
class APHLoss(NetworkLoss):
    """The squared error, weighed by the average perturbation Hessian.

    Args:
        temperature: divides logits.
        epsilon: how far elements are moved, relative to the root mean square of a sample's output.
        samples: how many samples it is averaged over, of each rank, the first ones; None: all.
    """

    temperature: float = 20.0
    epsilon: float = 1e-2
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.epsilon <= 0 or (self.samples is not None and self.samples < 1):
            raise SpecError(
                f"APHLoss(temperature={self.temperature}, epsilon={self.epsilon}, samples={self.samples}): all must be "
                "positive"
            )

    def begin(self, behind: "Behind") -> Objective:
        """The loss of one unit; of one that the logits do not depend on, the squared error."""
        if behind.warn_if_unseen("aph", behind.sees_logits):
            return OfOutput(weighted_error)
        return OfOutput(weighted_error, _SameForAll(perturbation_importance(behind, self), behind.targets.layout))


def perturbation_importance(behind: "Behind", loss: APHLoss) -> Tensor:
    """H for each element of a sample, with a mean of 1; shape of a row of the unit's output."""
    options, layout = behind.options, behind.targets.layout
    generator = torch.Generator().manual_seed(options.seed * 100_003 + behind.k)
    epsilon = max(loss.epsilon, 16 * torch.finfo(behind.targets.dtype).eps)  # half precision sees no less
    total, count, signs = None, 0, torch.ones(())
    for rows in behind.chunks(loss.samples):
        z = layout.rows(behind.targets.batch(rows)).float()
        if total is None:
            signs = (torch.randint(0, 2, z.shape[1:], generator=generator) * 2 - 1).to(z.device, z.dtype)
            total = torch.zeros(z.shape[1:], dtype=torch.float64, device=z.device)
        count += len(z)
        size = epsilon * z.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)
        size = size.view(-1, *[1] * (z.ndim - 1))
        up, down = (_gradient(behind, z + way * size * signs, rows, loss.temperature) for way in (1, -1))
        total += ((up - down).abs() / (2 * size)).double().sum(0)
    if total is None:
        return signs
    mean = behind.mean_of(total, count)
    scale = mean.mean()
    return (mean / scale if scale > 0 else torch.ones_like(mean)).float()


def _gradient(behind: "Behind", z: Tensor, rows: slice, temperature: float) -> Tensor:
    """The gradient of the divergence with `z` as the unit's output, rows of samples both."""
    layout, dtype = behind.targets.layout, behind.targets.dtype
    return layout.rows(behind.divergence_gradient(layout.tensor(z.to(dtype)), rows, temperature))


@dataclass
class _SameForAll:
    """Weights that are the same for all samples: one row, and how rows lie in a tensor."""

    row: Tensor
    layout: "SampleLayout"

    def batch(self, index: Tensor | slice) -> Tensor:
        """For some samples."""
        count = index.stop - index.start if isinstance(index, slice) else len(index)
        return self.layout.tensor(self.row.expand(count, *self.row.shape))
