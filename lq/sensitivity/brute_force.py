r"""Measured instead of estimated: one forward for each width of each tensor, as industrial toolkits do.

``BruteForce("kl")`` is ZeroQ's sensitivity, ``mean KL(F(θ) || F(θ with one tensor at b bits))`` (Cai et al., ZeroQ,
equation 5); "output_distortion" is RDO-Q's own procedure, ``E |F(θ') - F(θ)|^2 / dim(F)``; "loss" is what Fisher
estimates, the increase of the negative log-likelihood. All are exact in the size of the change. By default whole
tensors only: channels take a forward for each width of each group.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lq.attachment.float_models import float_model
from lq.bars import parts
from lq.errors import SpecError
from lq.sensitivity.metric import Metric
from lq.sensitivity.reading import Reading, log_likelihood
from lq.sensitivity.table import Accumulator, Found
from lq.sensitivity.tensors import MeasuredTensor

Measured = Literal["kl", "output_distortion", "loss"]


@dataclass(frozen=True)
class BruteForce(Metric):
    """One forward for each width of each tensor.

    Args:
        measured: "kl", "output_distortion" or "loss".
        groups: also measure each group of channels.
    """

    measured: Measured = "kl"
    groups: bool = False

    def __post_init__(self) -> None:
        if self.measured not in get_args(Measured):
            raise SpecError(f"measured={self.measured!r} is unknown; use one of {get_args(Measured)}")

    def measure(
        self,
        model: nn.Module,
        tensors: Sequence[MeasuredTensor],
        batches: Iterable[Any],
        reading: Reading,
    ) -> Found:
        """Run the model on every batch for every tensor and width."""
        sums = Accumulator(tensors)
        for batch in batches:
            with float_model(model), torch.no_grad():
                labelled = reading.has_label(batch) if self.measured == "loss" else None
                output = _Output(model, batch, reading, self.measured)
                if labelled is not None and not labelled.any():
                    sums.ignored += len(labelled)
                    continue
                sums.add([self._values(tensor, output, reading.group) for tensor in parts(tensors)], labelled)
        return sums.found(1.0, reading.reduce)

    def _values(self, tensor: MeasuredTensor, output: "_Output", group: int) -> tuple[Tensor, Tensor]:
        whole = torch.stack([output.change(tensor, width) for width in tensor.widths], -1)
        if not self.groups:
            return whole, whole.new_zeros(len(whole), 0, len(tensor.widths))
        if tensor.channels == 1:
            return whole, whole.unsqueeze(1)
        blocks = torch.arange(tensor.channels).split(group)
        parts = [[output.change(tensor, width, block) for width in tensor.widths] for block in blocks]
        return whole, torch.stack([torch.stack(block, -1) for block in parts], 1)


class _Output:
    """The float output of a batch, and how it changes with one tensor's width."""

    def __init__(self, model: nn.Module, batch: Any, reading: Reading, measured: Measured) -> None:
        self._run: Callable[[], Tensor] = lambda: reading.output(model, batch)
        self._measured = measured
        self._labels = reading.labels(batch) if measured == "loss" else None
        self._float = self._run()

    def change(self, tensor: MeasuredTensor, width: int, channels: Tensor | None = None) -> Tensor:
        """What the metric says of each sample if `channels` of the tensor (None: all) have that width, (S,)."""

        def tap(x: Tensor) -> Tensor:
            tensor.seen, tensor.numel = True, x.numel() // (1 if tensor.is_weight else len(self._float))
            rounded = tensor.rounded(x.float() if x.dtype in (torch.half, torch.bfloat16) else x, width).to(x.dtype)
            if channels is None:
                return rounded
            layout = tensor.layout
            chosen = torch.zeros(tensor.channels, dtype=torch.bool, device=x.device)
            chosen[channels.to(x.device)] = True
            return layout.join(torch.where(layout.spread(chosen, x), layout.split(rounded), layout.split(x)))

        before, tensor.quantizer.tap = tensor.quantizer.tap, tap
        try:
            return self._value(self._run())
        finally:
            tensor.quantizer.tap = before

    def _value(self, output: Tensor) -> Tensor:
        if self._labels is not None:
            return log_likelihood(self._float, self._labels) - log_likelihood(output, self._labels)
        if self._measured == "output_distortion":
            return (output - self._float).flatten(1).square().mean(1)
        target, found = (t.log_softmax(1) for t in (self._float, output))
        return (target.exp() * (target - found)).flatten(1).sum(1)
