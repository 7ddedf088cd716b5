"""The quantizer of an activation: it counts what flows through a place of the network, then rounds it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lq.errors import StateError
from lq.quantizer.functional import fake_quantize
from lq.quantizer.histogram import Histogram
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.ranges import Samples
from lq.quantizer.spec import QuantSpec, check_bits
from lq.quantizer.unreached import find_range, passed

# Error, over the power of the values, from which on an activation gets the width for outliers.
_MUCH = 0.01


class ActivationQuantizer(Quantizer):
    """Rounds the tensor that flows through a place of the network.

    Args:
        spec: width and range rule.
        name: where it sits, for messages.
        tokens: the tensor holds vectors along its last dimension (the input of a Linear), each a row of its own.
    """

    is_weight = False

    def __init__(self, spec: QuantSpec, name: str = "activation", *, tokens: bool = False) -> None:
        super().__init__(spec, None, name)
        self.tokens = tokens
        self.result_may_change = False  # in place, by the code behind it, such as a sum
        #: What calibration saw, kept so that another width needs no second pass over the data; not in checkpoints.
        self.seen: Samples | None = None
        self.told = False  # that it has no range (`lq.quantizer.unreached`)

    def observe(self) -> Histogram:
        """Count values from now on, and let them pass, until ``tap`` is None again."""
        histogram = Histogram(self.name, tokens=self.tokens)
        self.tap = histogram.count
        return histogram

    def calibrate(self, histogram: Histogram) -> None:
        """Find the range of the values in `histogram`."""
        self.seen = histogram.samples()
        self.refit()

    def refit(self) -> None:
        """Find the range anew, of the values that calibration saw.

        Raises:
            StateError: if it was not calibrated since it was made.
        """
        self._set_range(*self.samples(), weights=False)
        wider = None if self.spec is None else self.spec.outliers
        if wider is not None and float(self.bits.detach()) < wider and self.relative_error() > _MUCH:
            with torch.no_grad():
                self.bits.fill_(wider)
            self._set_range(*self.samples(), weights=False)

    @torch.no_grad()
    def relative_error(self) -> float:
        """Power of the rounding error over that of the values which calibration saw, each relative to its token's."""
        samples, _ = self.samples()
        values, weights = samples.values[0].float(), samples.error_weights(2.0)
        weights = torch.ones_like(values) if weights is None else weights
        powers = ((self._rounded(values) - values).square() @ weights, values.square() @ weights)
        return float(powers[0] / powers[1].clamp(min=torch.finfo(torch.float32).tiny))

    @torch.no_grad()
    def grids(self, bits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Step, lowest and highest level at each width, fitted to what calibration saw; shape (len(bits),) each."""
        samples, signed = self.samples()
        widths = torch.tensor([float(check_bits(b)) for b in bits], device=samples.values.device)
        rows = replace(samples, values=samples.values.expand(len(widths), -1))
        step, zero_point = self.grid(rows, signed, widths, weights=False)
        return step, -zero_point, torch.exp2(widths) - 1 - zero_point

    def samples(self) -> tuple[Samples, bool]:
        """The values seen, and whether they have both signs."""
        if self.seen is None:
            raise StateError(
                f"{self.name} has no record of its values (a checkpoint has none); run lq.calibrate(model, batches)"
            )
        signed = self.spec.signed if self.spec else None
        return self.seen, bool(self.seen.low < 0) if signed is None else signed

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the grid; same shape and dtype; without a range, see `lq.quantizer.unreached`.

        Raises:
            StateError: if it has no range yet, and was not left out by calibration.
            DataError: if `x` has NaN or Inf.
        """
        if self.tap is not None:
            return self.tap(x)
        if not self._calibrated and not find_range(self, x):
            return passed(self, x)  # type: ignore[no-any-return]
        self._check_finite(x)
        return self._rounded(x)

    def rounded_by(self, x: Tensor, log2_step: Tensor, *, kept: Tensor | None = None) -> Tensor:
        """`x` rounded with another step, with gradients to both; values where `kept` is 1 stay as they are."""
        return fake_quantize(x, log2_step, *self.bounds, kept=kept)

    def _rounded(self, x: Tensor) -> Tensor:
        log2_step, low, high, offset = self._grid()
        values_of_a_sample = x.numel() / max(x.shape[0], 1) if x.ndim else 1.0
        return fake_quantize(
            x,
            log2_step,
            low,
            high,
            offset,
            gradient_scale=self.estimator.gradient_scale(values_of_a_sample, high),
            backward=self.estimator if self.estimator.changes_gradients else None,
            changed=self.result_may_change,
        )
