r"""GLF: what the network's last layer reads is to be that of the float network, and so is the unit's own output.

``|f~ - f|^2 / C + 2 |y~ - y|^2 / (N C)`` of a sample, each term over its first value: f is what the last layer reads,
through the frozen float network behind the unit, and y the unit's output. Of the last layer itself, behind which there
is no f, the second term alone.

Source: GLF-Q (2026). Deviates: first values are those of nearest rounding over all samples, not of the first batch. The
mean of both terms is times the squared error of y at the same moment, so that lambda of the rounding penalty means the
same as for other losses.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.objective import NetworkLoss, Objective, OfOutput, Passes, over, weighted_error

if TYPE_CHECKING:
    from lq.reconstruction.behind import Behind


@dataclass(frozen=True)
class GlobalLoss(NetworkLoss):
    """Squared errors of the network's last features and of the unit's output.

    Args:
        local: weight of the unit's own error.
    """

    local: float = 2.0
    of_features = True

    def __post_init__(self) -> None:
        if not self.local >= 0:
            raise SpecError(f"GlobalLoss(local={self.local}): the weight must not be negative")

    def begin(self, behind: "Behind") -> Objective:
        """The loss of one unit; of one that features do not depend on, the squared error."""
        if behind.holds_head or behind.warn_if_unseen("global", behind.sees_features):
            return OfOutput(weighted_error)
        return _Global(self, behind)


class _Global:
    """The loss of one unit."""

    def __init__(self, loss: GlobalLoss, behind: "Behind") -> None:
        self.loss, self.behind = loss, behind
        self._first = torch.ones(2)

    @torch.no_grad()
    def begin(self, passes: Passes) -> None:
        total = torch.zeros(2, dtype=torch.float64, device=self.behind.targets.device)
        for rows, output, target in passes():
            total += self._terms(output, target, rows).double() * (rows.stop - rows.start)
        self._first = self.behind.mean_of(total, self.behind.samples).float()

    def advance(self, step: int, iterations: int, passes: Passes) -> None:
        """Nothing changes."""

    def __call__(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        features, local = over(self._terms(output, target, index), self._first)
        scale: Tensor = self._first[1].where(self._first[1] > 0, self._first.new_ones(()))
        loss: Tensor = scale * (features + self.loss.local * local) / (1 + self.loss.local)
        return loss

    def measure(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        return self(output, target, index)

    def _terms(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        """Squared errors of features and of the output, the latter summed over channels; (2,)."""
        found, kept = self.behind(output, index).features, self.behind.ends.features
        local = weighted_error(output, target)
        if found is None or kept is None:
            return torch.stack([local * 0, local])
        features = (found.float() - kept.batch(index).float()).square().mean()
        return torch.stack([features, local])
