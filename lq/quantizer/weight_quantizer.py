"""The quantizer of a weight: as the parametrization of a layer's, or where a function uses it."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import SpecError
from lq.quantizer.functional import fake_quantize, transforms_active
from lq.quantizer.histogram import raise_if_not_finite
from lq.quantizer.kept_weight import KeptWeight, WrittenWeight, can_be_kept, read_outside_of_forwards
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.ranges import Samples
from lq.quantizer.rounding import round_to_grid
from lq.quantizer.spec import QuantSpec, check_bits
from lq.structure.channels import ChannelLayout
from lq.structure.sources import Source


class WeightQuantizer(Quantizer):
    """Rounds a weight; used as a parametrization of it.

    In eval mode without gradients the result is kept until the weight, the grid or the mode changes
    (`lq.quantizer.kept_weight`). Code that writes into ``layer.weight`` in place changes the float weight behind it.

    Args:
        spec: widths, granularity, range rule.
        layout: where the output channels of the weight lie.
        name: name of the weight, for messages.
    """

    def __init__(self, spec: QuantSpec, layout: ChannelLayout, name: str = "weight") -> None:
        if isinstance(spec.bits, tuple) and len(spec.bits) != layout.channels:
            raise SpecError(f"{name}: {len(spec.bits)} widths were given for {layout.channels} channels")
        super().__init__(spec, layout.channels if spec.per_channel else None, name)
        self.layout = layout
        #: At a call: where the weight is kept; None: it is computed first, or not the same one each time.
        self.source: Source | None = None
        self.outdated = False  # the range is of other widths: the next call finds it anew
        self._kept: KeptWeight | None = None
        self._written: WrittenWeight | None = None

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        """Find the range of every channel of `weight`.

        Raises:
            DataError: if the weight has NaN or Inf.
        """
        raise_if_not_finite(weight, self.name)
        self.outdated = False
        self._set_range(*self.samples(weight), weights=True)

    @torch.no_grad()
    def rounded_at(self, weight: Tensor, bits: int, grid: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return `weight` as it would be at another width with the range of that width; the state stays as it is.

        Args:
            weight: the float weight.
            bits: the width.
            grid: what `grid_at` gave for it; None: it is found.
        """
        step, zero_point = self.grid_at(weight, bits) if grid is None else grid
        low = -zero_point
        parts = (step, low, 2.0**bits - 1 + low, zero_point.frac())
        step, *bounds = (self.layout.spread(part.to(weight.dtype).view(self.bits.shape), weight) for part in parts)
        return self.layout.join(round_to_grid(self.layout.split(weight), step, *bounds))

    @torch.no_grad()
    def grid_at(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Step and zero point of every channel of `weight` at another width, fitted to it; (C,) each."""
        samples, signed = self.samples(weight)
        widths = torch.full_like(samples.low, float(check_bits(bits)))
        return self.grid(samples, signed, widths, weights=True)

    def samples(self, weight: Tensor) -> tuple[Samples, bool]:
        """The values that share a step, by row, and whether they have both signs."""
        values = self.rows(weight)
        signed = self.spec.signed if self.spec else True
        return Samples(values), bool(values.min() < 0) if signed is None else signed

    def rows(self, weight: Tensor) -> Tensor:
        """The values that share a step, by row; float32."""
        weight = weight.detach().float()
        return self.layout.rows(weight) if self.bits.ndim else weight.reshape(1, -1)

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` rounded to the grid; same shape and dtype."""
        if self.tap is not None:
            return self.tap(weight)
        if torch.compiler.is_compiling():
            return self._quantize(weight)
        self.take_over_writes()
        keeps = can_be_kept(weight) and not (self.training or torch.is_grad_enabled() or transforms_active())
        kept_weight = self._kept if keeps else None
        if kept_weight is None or not kept_weight.is_of(weight, self):
            rounded = self._quantize(weight)
            self._kept = KeptWeight(weight, self, rounded) if keeps else None
        else:
            rounded = kept_weight.rounded
        if not transforms_active() and read_outside_of_forwards():
            rounded = rounded.clone() if keeps else rounded  # what is kept must not be written to
            self._written = WrittenWeight(weight, rounded)
        return rounded

    def take_over_writes(self) -> None:
        """Change the float weight as code outside of a forward has changed ``layer.weight`` in place."""
        written, self._written = self._written, None
        if written is None:
            return
        if written.take_over():
            self._kept = None
            self.calibrate(written.weight)

    def at_call(self, weight: Tensor, layout: ChannelLayout, module: nn.Module) -> Tensor:
        """Return the rounded weight of a call of `module`, which may be computed anew for each."""
        self.layout = layout
        if self.source is not None and not torch.compiler.is_compiling() and not self.source.gives(weight, module):
            self.source = None
        if self.tap is not None:
            return self.tap(weight)
        if not self._calibrated or self.outdated:
            self.calibrate(weight)
        return self._quantize(weight)

    def forget_range(self) -> None:
        """Have the next `at_call` find the range."""
        with torch.no_grad():
            self.log2_step.fill_(torch.nan)
        self.refresh()

    def train(self, mode: bool = True) -> "WeightQuantizer":
        """Set the mode, and let go of the kept weight."""
        self.take_over_writes()
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies recompute the kept weight."""
        return {**super().__getstate__(), "_kept": None}

    def _quantize(self, weight: Tensor) -> Tensor:
        self._check_finite(weight)
        log2_step, *bounds = self._grid()
        low, high, offset = (self.layout.spread(b, weight) if isinstance(b, Tensor) else b for b in bounds)
        values_per_step = weight.numel() / max(self.bits.numel(), 1)
        rounded = fake_quantize(
            self.layout.split(weight),
            self.layout.spread(log2_step, weight),
            low,
            high,
            offset,
            gradient_scale=self.estimator.gradient_scale(values_per_step, high),
            backward=self.estimator if self.estimator.changes_gradients else None,
        )
        return self.layout.join(rounded)
