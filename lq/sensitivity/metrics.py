r"""What a change is measured by: metrics that one backward per batch measures, told apart by the gradient they send.

With ``g_n`` the gradient of a scalar of sample n's output, the table holds ``scale * mean_n (g_n · Δ)^2``: of a whole
tensor, with the terms of its channels added before the square (MPQCO), and of each group of channels alone (RDO-Q).
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lq.errors import SpecError
from lq.sensitivity.kept_terms import KeptTerms
from lq.sensitivity.metric import Loss, Metric
from lq.sensitivity.one_pass import OnePass
from lq.sensitivity.reading import Reading, log_likelihood
from lq.sensitivity.table import Accumulator, Found
from lq.sensitivity.tensors import MeasuredTensor
from lq.structure.outputs import require_loss


class _Squared(Metric):
    """Metrics of the form ``scale * mean_n (g_n · Δ)^2``."""

    finds_cross_terms = True
    scale: float

    @abstractmethod
    def objective(self, model: nn.Module, batch: Any, reading: Reading) -> Tensor:
        """Sum over samples of what is differentiated."""

    def counted(self, batch: Any, reading: Reading) -> Tensor | None:
        """Which samples count, (B,); None: all of them."""
        return None

    def measure(
        self,
        model: nn.Module,
        tensors: Sequence[MeasuredTensor],
        batches: Iterable[Any],
        reading: Reading,
    ) -> Found:
        """One forward and one backward per batch."""
        one_pass = OnePass(model, tensors, lambda model, batch: self.objective(model, batch, reading), reading.layout)
        sums = Accumulator(tensors)
        kept = KeptTerms() if reading.cross_terms else None
        for batch in batches:
            counted = self.counted(batch, reading)
            if counted is not None and not counted.any():
                sums.ignored += len(counted)
                continue
            terms = one_pass.measure(batch)
            parts = [grouped(found, reading.group) for found in terms]
            sums.add([(f.sum(1).square(), part.square()) for f, part in zip(terms, parts, strict=True)], counted)
            if kept is not None:
                kept.add(parts, counted)
        notes = (f"one sample at a time: {one_pass.single}",) if one_pass.single else ()
        found = sums.found(self.scale, reading.reduce, notes)
        return found if kept is None else replace(found, terms=kept.found(self.scale))


def grouped(terms: Tensor, group: int) -> Tensor:
    """Terms (S, C, W) added up over groups of adjacent channels, (S, G, W)."""
    if group == 1:
        return terms
    found: Tensor = F.pad(terms, (0, 0, 0, -terms.shape[1] % group)).unflatten(1, (-1, group)).sum(2)
    return found


@dataclass(frozen=True)
class Fisher(_Squared):
    r"""Expected increase of the loss by the empirical Fisher information: ``1/(2N) sum_n (grad log p(y_n|x_n) · Δ)^2``.

    Chen et al., Towards Mixed-Precision Quantization of Neural Networks via Constrained Optimization (MPQCO), equation
    12. Their Fisher is of the labels in the data; ``labels="model"`` takes the model's own distribution instead: the
    curvature of the KL divergence to the float model. It needs no labels, and is what the Hessian tends to when the
    model fits its data (Proposition 1 of the supplement). One random vector with the covariance ``diag(p) - p p^T``
    stands for all labels: its terms scatter far less than those of one sampled label.

    With a temperature above 1 the model's distribution is softened first. Where the model is sure, the curvature at
    temperature 1 says nothing about changes large enough to unsettle it: with its first layer at 0 bits, the KL
    divergence of ResNet-20 is 100 times what it predicts.

    Args:
        labels: "data" or "model".
        temperature: of the model's distribution, with ``labels="model"``.
        loss: mean loss of a batch, called with the model and the batch; None: the negative log-likelihood of the
            labels, told by their dtype: of classes (integers, cross-entropy on logits (B, K, ...)) or of a normal
            distribution (floats of the output's shape, half the squared error).
    """

    labels: Literal["data", "model"] = "data"
    temperature: float = 1.0
    loss: Loss | None = None
    scale = 0.5

    def __post_init__(self) -> None:
        if self.labels not in ("data", "model"):
            raise SpecError(f"labels={self.labels!r} is unknown; use 'data' or 'model'")
        if self.temperature <= 0 or (self.temperature != 1 and self.labels != "model"):
            raise SpecError(f"temperature={self.temperature} must be positive, and is of labels='model' alone")
        if self.labels == "model" and self.loss is not None:
            raise SpecError("labels='model' takes the model's own distribution; a loss has no part in it")

    def with_loss(self, loss: Loss | None) -> Self:
        """With that loss, if it has none; ``labels="model"`` takes none."""
        return self if self.labels == "model" else super().with_loss(loss)

    def counted(self, batch: Any, reading: Reading) -> Tensor | None:
        """Those that have a label, where labels are used."""
        return reading.has_label(batch) if self.labels == "data" and self.loss is None else None

    def objective(self, model: nn.Module, batch: Any, reading: Reading) -> Tensor:
        """Sum over samples of what is differentiated."""
        if self.loss is not None:
            return require_loss(self.loss(model, batch)) * reading.layout.size(batch)
        output = reading.output(model, batch)
        if self.labels == "model":
            root = (output.detach() / self.temperature).softmax(1).sqrt()
            noise = signs(output)
            sent = root * (noise - root * (root * noise).sum(1, keepdim=True))
            return torch.sum(output * sent)
        return torch.sum(log_likelihood(output, reading.labels(batch)))


@dataclass(frozen=True)
class OutputDistortion(_Squared):
    r"""Expected squared change of the output ``E |F(W + Δ) - F(W)|^2 / dim``, to first order ``E (v · J Δ)^2 / dim``.

    Wang et al., RDO-Q, equation 2 and the supplement's equations 3 to 6; ``v`` is a vector of random signs for each
    sample. The published code runs the network for every channel group and width instead.
    """

    scale = 1.0

    def objective(self, model: nn.Module, batch: Any, reading: Reading) -> Tensor:
        """Sum over samples of what is differentiated."""
        output = reading.output(model, batch).flatten(1)
        found: Tensor = (output * signs(output)).sum() / math.sqrt(output.shape[1])
        return found


def signs(like: Tensor) -> Tensor:
    """Random signs, from the CPU's generator on every device."""
    found: Tensor = torch.randint(2, like.shape).mul_(2).sub_(1).to(like, non_blocking=True)
    return found
