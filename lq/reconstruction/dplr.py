r"""DPLR: the Fisher information of a unit's output as a diagonal and a low rank, both of gradients seen on the way.

Every fifth of the iterations two rows are added, of the unit as it is then: ``g = mean |dKL/dz~|`` to G, and ``d = mean
|z~ - z|`` to D, means over samples. With ``B = (D D^T)^-1`` the loss of a sample is

    ``|dz| G^T B G |dz|^T  +  mean(dz^2 * mean over rows of G)``,

the mean over samples, each of both terms over its value when the rows were added. KL is that of the float network's
probabilities against those of the float network behind the unit, given the unit's quantized output.

Source: Wu et al., FIMA-Q, CVPR 2025. Deviates: the first rows are those of nearest rounding, which differs from the
float network even where activations do not; their loss is also what units are compared by, before and after. D D^T gets
a millionth of its mean diagonal, since rows of later looks are nearly parallel. The mean of both terms is times the
squared error at the same moment, so that lambda of the rounding penalty means the same as for other losses.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.reconstruction.objective import NetworkLoss, Objective, OfOutput, Passes, channels_of, over, weighted_error

if TYPE_CHECKING:
    from lq.reconstruction.behind import Behind
    from lq.reconstruction.flow import SampleLayout

# Share of the mean diagonal of D D^T that is added to it.
_DAMPING = 1e-6


@dataclass(frozen=True)
class DPLRLoss(NetworkLoss):
    """Diagonal and low-rank parts of the Fisher information.

    Args:
        rank: how often gradients are looked at, evenly over the iterations.
        temperature: divides logits.
        samples: how many samples gradients are averaged over, of each rank, the first ones; None: all.
    """

    rank: int = 5
    temperature: float = 1.0
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.temperature <= 0 or (self.samples is not None and self.samples < 1):
            raise SpecError(
                f"DPLRLoss(rank={self.rank}, temperature={self.temperature}, samples={self.samples}): all must be "
                "positive"
            )

    def begin(self, behind: "Behind") -> Objective:
        """The loss of one unit; of one that the logits do not depend on, the squared error."""
        if behind.warn_if_unseen("dplr", behind.sees_logits):
            return OfOutput(weighted_error)
        return _DiagonalAndLowRank(self, behind)


@dataclass
class Fisher:
    """Both parts, and what they are divided by.

    Args:
        factor: a root P of the low-rank part, ``P^T P = G^T B G``; (k, M).
        diagonal: the mean over rows of G; (M,).
        layout: how samples lie in the unit's output.
        first: value of the low-rank term, of the diagonal one, and the squared error, when this was made; (3,).
    """

    factor: Tensor
    diagonal: Tensor
    layout: "SampleLayout"
    first: Tensor

    @classmethod
    def of(cls, gradients: Tensor, differences: Tensor, layout: "SampleLayout") -> "Fisher":
        """Of G and D, (k, M) each; nothing is divided yet."""
        correlation = differences.double() @ differences.double().T
        damping = _DAMPING * correlation.diagonal().mean().clamp(min=1e-300)
        correlation = correlation + damping * torch.eye(len(correlation)).to(correlation)
        factor = torch.linalg.solve_triangular(torch.linalg.cholesky(correlation), gradients.double(), upper=False)
        return cls(factor.float(), gradients.mean(0), layout, torch.ones(3, device=gradients.device))

    def terms(self, output: Tensor, target: Tensor) -> Tensor:
        """Both terms, means over samples, and the squared error; (3,)."""
        rows = self.layout.rows(output.float() - target.float()).flatten(1)
        low_rank = (rows.abs() @ self.factor.T).square().sum(1).mean()
        squares = rows.square()
        diagonal = (squares * self.diagonal).mean()
        return torch.stack([low_rank, diagonal, squares.mean() * channels_of(output)])

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss; the squared error where a term had no value to be divided by."""
        terms = self.terms(output, target)
        relative = over(terms[:2], self.first[:2])
        return torch.where((self.first > 0).all(), self.first[2] * relative.mean(), terms[2])


class _DiagonalAndLowRank:
    """The loss of one unit."""

    def __init__(self, loss: DPLRLoss, behind: "Behind") -> None:
        self.loss, self.behind = loss, behind
        self._gradients: list[Tensor] = []
        self._differences: list[Tensor] = []
        self._first: Fisher | None = None
        self._now: Fisher | None = None

    def begin(self, passes: Passes) -> None:
        self._look(passes)
        self._first = self._now

    def advance(self, step: int, iterations: int, passes: Passes) -> None:
        due = [k * iterations // self.loss.rank for k in range(1, self.loss.rank)]
        if step > 0 and step in due:
            self._look(passes)

    def __call__(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        return weighted_error(output, target) if self._now is None else self._now(output, target)

    def measure(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        return weighted_error(output, target) if self._first is None else self._first(output, target)

    def _look(self, passes: Passes) -> None:
        """Add rows to G and D, of the unit as it is now; none if it does not differ from the float one."""
        gradient, difference = self._rows(passes)
        if bool((gradient > 0).any()) and bool((difference > 0).any()):
            self._gradients.append(gradient)
            self._differences.append(difference)
        if not self._gradients:
            return
        gradients, differences = torch.stack(self._gradients), torch.stack(self._differences)
        unit = Fisher.of(gradients, differences, self.behind.targets.layout)
        total = torch.zeros(3, dtype=torch.float64, device=gradients.device)
        for rows, output, target in passes():
            total += unit.terms(output, target).double() * (rows.stop - rows.start)
        self._now = replace(unit, first=self.behind.mean_of(total, self.behind.samples).float())

    def _rows(self, passes: Passes) -> tuple[Tensor, Tensor]:
        """The mean absolute gradient, and the mean absolute difference; (M,) each."""
        layout, limit = self.behind.targets.layout, self.loss.samples
        total: Tensor | None = None
        count = 0
        for rows, output, target in passes():
            if limit is not None and rows.start >= limit:
                break
            gradient = self.behind.divergence_gradient(output, rows, self.loss.temperature)
            parts = (layout.rows(t.float()).abs().flatten(1).double().sum(0) for t in (gradient, output - target))
            both = torch.stack(tuple(parts))
            total = both if total is None else total + both
            count += rows.stop - rows.start
        if total is None:
            return torch.zeros(1), torch.zeros(1)
        gradient, difference = self.behind.mean_of(total, count).float()
        return gradient, difference
