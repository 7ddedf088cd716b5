"""How a model is run on batches, and what is read of it: outputs, labels and the likelihood of labels."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lq.errors import DataError
from lq.quantizer.histogram import Reduce
from lq.structure.batch_layout import FIRST, Layout
from lq.structure.forward import Forward, describe, run
from lq.structure.outputs import require_output

#: The label of what has none, as in torch's cross-entropy.
IGNORED = -100

# What to do where labels do not say what the loss is, for those who call functions and for those who use a Trainer.
_OWN_LOSS = (
    "give the metric a loss of its own, such as lq.sensitivity.Fisher(loss=f): f gets the model and the batch and "
    "returns the mean loss (with a Trainer, a method calibration_loss(batch) of the module does as well)"
)


@dataclass(frozen=True)
class Reading:
    """How batches are read, by whatever metric.

    Args:
        forward: called with the model and a batch, returns the output; None: as in `lq.calibrate`.
        layout: where the samples of inputs, labels and outputs lie.
        group: number of adjacent output channels that are measured together, besides the whole tensor.
        reduce: combines a tensor over ranks; None: there is one.
        cross_terms: whether to keep the terms of samples, for what tensors lose together.
    """

    forward: Forward | None = None
    layout: Layout = FIRST
    group: int = 1
    reduce: Reduce | None = None
    cross_terms: bool = False

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model gives for a batch, samples first."""
        return self.layout.output(require_output(run(model, batch, self.forward)))

    def labels(self, batch: Any) -> Tensor:
        """The labels of a batch, samples first."""
        return self.layout.labels(labels_of(batch), batch)

    def has_label(self, batch: Any) -> Tensor | None:
        """Which samples have a label that is not ignored, (B,); None: all, or labels are no classes."""
        labels = self.labels(batch)
        if labels.is_floating_point() or not labels.ndim:
            return None
        found = (labels != IGNORED).reshape(len(labels), -1).any(1)
        return None if bool(found.all()) else found


def log_likelihood(output: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of the labels of each sample, (B,).

    Raises:
        DataError: if labels and output do not go together.
    """
    labels = labels.to(output.device)
    if not labels.is_floating_point() and output.ndim > 1 and labels.shape == (output.shape[0], *output.shape[2:]):
        try:
            losses = F.cross_entropy(output, labels.long(), reduction="none", ignore_index=IGNORED)
        except IndexError as error:
            raise DataError(
                f"a label is no class of an output {describe(output)}: {error}; classes go from 0 to "
                f"{output.shape[1] - 1}, {IGNORED} stands for none"
            ) from error
        return -losses.reshape(len(output), -1).sum(1)
    if labels.is_floating_point() and labels.shape == output.shape:
        return -0.5 * (output - labels).square().reshape(len(output), -1).sum(1)
    raise DataError(
        f"labels {describe(labels)} of {labels.dtype} do not go with an output {describe(output)}: expected classes "
        f"(B, ...) for logits (B, K, ...), or floats of the output's shape; {_OWN_LOSS}"
    )


def labels_of(batch: Any) -> Tensor:
    """The second part of a batch.

    Raises:
        DataError: if there is none.
    """
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    raise DataError(
        f"a batch of {describe(batch)} has no labels in its second place; {_OWN_LOSS}; or measure without labels, by "
        "Fisher(labels='model') or OutputDistortion()"
    )
