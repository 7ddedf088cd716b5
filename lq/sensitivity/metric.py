"""What a metric of sensitivity is: how it measures, and what it can do with a loss of the caller's own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn
from typing_extensions import Self

from lq.sensitivity.reading import Reading
from lq.sensitivity.table import Found
from lq.sensitivity.tensors import MeasuredTensor

#: Mean loss over the samples of a batch, of a model run on it.
Loss = Callable[[nn.Module, Any], Tensor]


class Metric(Protocol):
    """A way to measure what a width costs; subclasses are dataclasses."""

    #: Whether it finds the terms of what tensors lose together, if ``reading.cross_terms`` asks for them.
    finds_cross_terms: bool = False

    def with_loss(self, loss: Loss | None) -> Self:
        """The metric with `loss` as its field ``loss``, if it has one that is None; else as it is.

        `lq.callbacks.AllocateBits` gives metrics the module's own loss so.
        """
        if is_dataclass(self) and getattr(self, "loss", self) is None:
            return replace(self, loss=loss)
        return self

    def measure(
        self,
        model: nn.Module,
        tensors: Sequence[MeasuredTensor],
        batches: Iterable[Any],
        reading: Reading,
    ) -> Found:
        """Measure `tensors` on `batches`, read as `reading` says."""
        ...
