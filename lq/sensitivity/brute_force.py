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
from lq.errors import SpecError
from lq.quantizer.histogram import Reduce
from lq.sensitivity.items import Item
from lq.sensitivity.metrics import has_label, labels_of, log_likelihood
from lq.sensitivity.table import Accumulator, Found
from lq.structure.batch_layout import FIRST, Layout
from lq.structure.forward import Forward, run
from lq.structure.outputs import require_output

Measured = Literal["kl", "output_distortion", "loss"]


@dataclass(frozen=True)
class BruteForce:
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
        items: Sequence[Item],
        batches: Iterable[Any],
        *,
        group: int,
        forward: Forward | None,
        reduce: Reduce | None,
        layout: Layout = FIRST,
    ) -> Found:
        """Run the model on every batch for every item and width."""
        sums = Accumulator(items)
        for batch in batches:
            with float_model(model), torch.no_grad():
                labelled = has_label(batch, layout) if self.measured == "loss" else None
                output = _Output(model, batch, forward, self.measured, layout)
                if labelled is not None and not labelled.any():
                    sums.ignored += len(labelled)
                    continue
                sums.add([self._values(item, output, group) for item in items], labelled)
        return sums.found(1.0, reduce)

    def _values(self, item: Item, output: "_Output", group: int) -> tuple[Tensor, Tensor]:
        whole = torch.stack([output.change(item, width) for width in item.widths], -1)
        if not self.groups:
            return whole, whole.new_zeros(len(whole), 0, len(item.widths))
        if item.channels == 1:
            return whole, whole.unsqueeze(1)
        blocks = torch.arange(item.channels).split(group)
        parts = [[output.change(item, width, block) for width in item.widths] for block in blocks]
        return whole, torch.stack([torch.stack(block, -1) for block in parts], 1)


class _Output:
    """The float output of a batch, and how it changes with one tensor's width."""

    def __init__(
        self, model: nn.Module, batch: Any, forward: Forward | None, measured: Measured, layout: Layout
    ) -> None:
        self._run: Callable[[], Tensor] = lambda: layout.output(require_output(run(model, batch, forward)))
        self._measured = measured
        self._labels = layout.labels(labels_of(batch), batch) if measured == "loss" else None
        self._float = self._run()

    def change(self, item: Item, width: int, channels: Tensor | None = None) -> Tensor:
        """What the metric says of each sample if `channels` of the item (None: all) have that width, (S,)."""

        def tap(x: Tensor) -> Tensor:
            item.seen, item.numel = True, x.numel() // (1 if item.is_weight else len(self._float))
            rounded = item.rounded(x.float() if x.dtype in (torch.half, torch.bfloat16) else x, width).to(x.dtype)
            if channels is None:
                return rounded
            layout = item.layout
            chosen = torch.zeros(item.channels, dtype=torch.bool, device=x.device)
            chosen[channels.to(x.device)] = True
            return layout.join(torch.where(layout.spread(chosen, x), layout.split(rounded), layout.split(x)))

        before, item.quantizer.tap = item.quantizer.tap, tap
        try:
            return self._value(self._run())
        finally:
            item.quantizer.tap = before

    def _value(self, output: Tensor) -> Tensor:
        if self._labels is not None:
            return log_likelihood(self._float, self._labels) - log_likelihood(output, self._labels)
        if self._measured == "output_distortion":
            return (output - self._float).flatten(1).square().mean(1)
        target, found = (t.log_softmax(1) for t in (self._float, output))
        return (target.exp() * (target - found)).flatten(1).sum(1)
