r"""Levels that halve: for attention probabilities, most of which are tiny beside a few large ones.

The levels are ``s, s/2, s/4, ..., s * 2^-(2^b - 2), 0``: with ``v = log2(s / x)`` and the code ``q = clamp(round(v), 0,
2^b - 1)``, a value x becomes ``s * 2^-q``, and 0 at the last code (RepQ-ViT, Li et al., ICCV 2023, arXiv:2212.08254;
AdaLog, Wu et al., ECCV 2024, arXiv:2407.12951, with other bases). Negative values become 0. A uniform grid of 4 bits
has one level for all probabilities below a thirtieth of its range; this one has ten.

Backward: straight through to x below s, 0 above; to the scale, ``(x^ - x) / s`` below and 1 above, as for the step of a
uniform grid.

Integer engines do not know such levels, though a product with one is a shift. Exports have them as ordinary operators
in float.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.estimators import Estimator, estimator
from lq.quantizer.ranges import Samples
from lq.quantizer.rounding import Bound, step_size
from lq.quantizer.spec import QuantSpec, check_bits


def round_to_log2(x: Tensor, scale: Tensor, bits: Bound) -> Tensor:
    """`x` rounded to the levels that halve from `scale` on, without a gradient.

    >>> round_to_log2(torch.tensor([0.9, 0.3, 0.02, -1.0]), torch.tensor(1.0), 3)
    tensor([1.0000, 0.2500, 0.0156, 0.0000])
    """
    last = 2.0**bits - 1
    codes = torch.log2(scale / x.clamp(min=0.0)).round_().clamp_(min=0.0)
    return torch.where(codes >= last, 0.0, scale * torch.exp2(-codes))


class Log2Quantizer(ActivationQuantizer):
    """An activation quantizer whose levels halve.

    In its state ``log2_step`` is the logarithm of the largest level, and ``log2_base`` tells it from a uniform one.

    Args:
        spec: width; ``levels="log2"``.
        name: where it sits, for messages.
        tokens: as for an `ActivationQuantizer`.
    """

    log2_base: Tensor

    def __init__(self, spec: QuantSpec, name: str = "activation", *, tokens: bool = False) -> None:
        super().__init__(spec, name, tokens=tokens)
        self.register_buffer("log2_base", torch.ones(()))  # the logarithm of 2

    def set_estimator(self, value: str | Estimator) -> None:
        """Choose how gradients pass, and whether the largest level is learned.

        Raises:
            SpecError: for an estimator that learns widths, or changes gradients by the distance of two levels.
        """
        chosen = estimator(value).of_activations
        if "bits" in chosen.learns or chosen.changes_gradients:
            raise SpecError(
                f"{self.name} has levels that halve, which the estimator {value!r} does not know; "
                "use 'ste', 'lsq' or 'lsq_plus', or levels='uniform'"
            )
        super().set_estimator(chosen)

    @torch.no_grad()
    def settle(self, widths: Tensor) -> None:
        """Change the width; the largest level stays."""
        self.bits.copy_(widths)
        self.final_bits = None
        self.refresh()

    def grid(self, samples: Samples, signed: bool, bits: Tensor, *, weights: bool) -> tuple[Tensor, Tensor]:
        """The largest value, whatever the width and the rule, and no zero point; (C,) each."""
        high = samples.high.clamp(min=2.0**-100).expand_as(bits).to(bits)
        return torch.exp2(torch.log2(high).round()) if self.spec and self.spec.power_of_two else high, bits * 0

    def rounded_at(self, x: Tensor, bits: int) -> Tensor:
        """`x` at another width."""
        scale = step_size(self.log2_step.detach()).to(x.dtype)
        return round_to_log2(x, scale, float(check_bits(bits))) if bits else torch.zeros_like(x)

    def grids(self, bits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The largest level at each width, and 0 and 1, between which all are; shape (len(bits),) each."""
        samples, _ = self.samples()
        scale = self.grid(samples, False, torch.zeros(len(bits), device=samples.values.device), weights=False)[0]
        return scale, torch.zeros_like(scale), torch.ones_like(scale)

    @property
    def bounds(self) -> tuple[Bound, Bound, Bound]:
        """Lowest and highest level, over the largest one, and no offset."""
        return 0.0, 1.0, 0.0

    def rounded_by(
        self, x: Tensor, log2_step: Tensor, *, kept: Tensor | None = None, gradient_scale: Bound = 1.0
    ) -> Tensor:
        """`x` rounded with another largest level, with gradients to both."""
        scale = step_size(log2_step)
        scale = scale.detach() + (scale - scale.detach()) * gradient_scale
        values = x.float()
        with torch.no_grad():
            rounded = round_to_log2(values, scale, self.bits) if bool(self.bits) else torch.zeros_like(values)
        if torch.is_grad_enabled() and (values.requires_grad or scale.requires_grad):
            below = values + scale * ((rounded - values) / scale).detach()
            passed = torch.where(values > scale, scale, below)
            rounded = rounded + (passed - passed.detach())
        if kept is not None:
            rounded = torch.lerp(rounded, values, kept)
        return rounded.to(x.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        values_of_a_sample = x.numel() / max(x.shape[0], 1) if x.ndim else 1.0
        scale = self.estimator.gradient_scale(values_of_a_sample, 2 ** self.bits.detach() - 1)
        return self.rounded_by(x, self.log2_step, gradient_scale=scale)
