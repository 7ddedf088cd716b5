"""The mean loss of a network over samples, of all ranks, as it is now: what `optimize_ranges` measures."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from lq.attachment.float_models import float_model
from lq.errors import DataError
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward, describe, run
from lq.structure.outputs import kl_divergence, require_loss, require_output
from lq.structure.samples import batch_size

#: A loss by name: divergence from the float network, or cross-entropy with the classes in ``batch[1]``.
NamedLoss = Literal["kl", "task"]

#: The mean loss of a batch, of what the forward returned for it and the batch.
OutputLoss = Callable[[Any, Any], Tensor]


class NetworkLoss:
    """The mean loss over all samples (of all ranks) of the model as it is; counts how often it was asked."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: NamedLoss | OutputLoss,
        forward: Forward | None,
        reduce: Reduce | None,
    ) -> None:
        self.evaluations = 0
        self._model, self._loss, self._forward = model, loss, forward
        self._device = next(model.parameters()).device
        self._reduce = reduce or (lambda tensor, _: tensor)
        self._batches = [_pytree.tree_map(self._moved, batch) for batch in batches]
        self._samples = self._total(float(sum(batch_size(batch) for batch in self._batches)))
        if not self._samples:
            raise DataError("optimize_ranges got no batches: the loader is empty; give it at least one batch")
        self._targets: list[Any] = [None] * len(self._batches)
        if loss == "kl":
            with float_model(model):
                self._targets = [require_output(run(model, batch, forward)) for batch in self._batches]

    def __call__(self) -> float:
        """The loss, infinite where it is not a number."""
        self.evaluations += 1
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch, target in zip(self._batches, self._targets, strict=True):
            total += self._of(run(self._model, batch, self._forward), batch, target).double() * batch_size(batch)
        found = self._total(total) / self._samples
        return found if math.isfinite(found) else math.inf

    def _of(self, output: Any, batch: Any, target: Any) -> Tensor:
        if not isinstance(self._loss, str):
            return require_loss(self._loss(output, batch))
        output = require_output(output)
        return kl_divergence(output, target) if self._loss == "kl" else _cross_entropy(output, batch)

    def _moved(self, part: Any) -> Any:
        return part.to(self._device) if isinstance(part, Tensor) else part

    def _total(self, mine: float | Tensor) -> float:
        """The sum over ranks."""
        return float(self._reduce(torch.as_tensor(mine, dtype=torch.float64, device=self._device), "sum"))


def _cross_entropy(output: Tensor, batch: Any) -> Tensor:
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    expected = (output.shape[0], *output.shape[2:]) if output.ndim > 1 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != expected:
        raise DataError(
            f"loss='task' got a batch of {describe(batch)} and an output of {describe(output)}; it needs batches "
            "(input, classes) with classes (B, ...) for logits (B, K, ...). Use loss='kl', which needs no labels, or a "
            "callable of the output and the batch"
        )
    return F.cross_entropy(output.float(), labels.long())
