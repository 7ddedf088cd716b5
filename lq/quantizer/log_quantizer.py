r"""Logarithmic levels, for tensors with many small values and a few large ones.

With the largest value s, a base and a shift, the levels are ``s * base^-q - shift`` for the codes ``q = 0 .. 2^b - 2``,
and a value c at the last code. A value x gets the code ``clamp(round(log_base(s / (x + shift))), 0, 2^b - 1)``.

- ``levels="log2"`` is for what a softmax gives: base 2, no shift, c = 0; the levels halve (RepQ-ViT, Li et al., ICCV
  2023, arXiv:2212.08254). A uniform grid of 4 bits has one level for all probabilities below a thirtieth of its range;
  this one has ten.
- ``levels="log"`` is for what a GELU or SiLU gives too, with values a little below zero: the shift is the least value,
  and s and the base are those with the least squared error (AdaLog, Wu et al., ECCV 2024, arXiv:2407.12951). Deviates:
  the base may be any number, in AdaLog one that tables of integers know; errors count relative to the size of the
  token, as for other ranges; and c is the mean of the values that get the last code.

Backward: straight through to x below s - shift, 0 above; to s, ``(x^ - x) / s`` below and 1 above, as for the step of a
uniform grid.

Integer engines do not know such levels, though a product with a power of two is a shift. Exports have them as ordinary
operators in float.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.estimators import Estimator, estimator
from lq.quantizer.functional import transforms_active
from lq.quantizer.gradients import inside_of_bounds
from lq.quantizer.ranges import Samples
from lq.quantizer.rounding import Bound, alike, mixed, step_size
from lq.quantizer.spec import LevelsName, QuantSpec, check_bits

#: Parts of the state that other quantizers do not have; the last two only "log" has.
LOG_STATE = BASE, SHIFT, REST = "log2_base", "log_shift", "log_rest"

# Candidates of "log": octaves from the largest to the smallest level, and the largest level over the largest value.
_OCTAVES = torch.linspace(2.0, 15.0, 27)
_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
_LEAST = 2.0**-100
# Values that the CPU works on at a time.
_BLOCK = 1 << 18


class LogGrid(NamedTuple):
    """Logarithmic levels at one width.

    Args:
        scale: s, shape ().
        base: logarithm of the base to base 2.
        shift: what is added to values.
        rest: the value at the last code.
    """

    scale: Tensor
    base: Tensor
    shift: Tensor | float = 0.0
    rest: Tensor | float = 0.0

    @property
    def highest(self) -> Tensor:
        """The largest level."""
        return self.scale - self.shift

    def rounded(self, x: Tensor, bits: Bound) -> Tensor:
        """`x` rounded, without a gradient.

        >>> LogGrid(torch.tensor(1.0), torch.tensor(1.0)).rounded(torch.tensor([0.9, 0.3, 0.02, -1.0]), 3)
        tensor([1.0000, 0.2500, 0.0156, 0.0000])
        """
        if x.is_contiguous() and x.device.type == "cpu" and x.numel() > _BLOCK and not transforms_active():
            out = torch.empty_like(x)  # in blocks that stay in its cache
            for part, to in zip(x.view(-1).split(_BLOCK), out.view(-1).split(_BLOCK), strict=True):
                self._round(torch.add(part, self.shift, out=to), bits)
            return out
        return self._round(x + self.shift, bits)

    def _round(self, moved: Tensor, bits: Bound) -> Tensor:
        """Values with the shift added become levels, in place."""
        codes = moved.clamp_(min=0.0).log2_().sub_(torch.log2(self.scale)).mul_(-1 / self.base).round_().clamp_(min=0.0)
        lost = codes >= 2.0**bits - 1
        levels = codes.mul_(-self.base).exp2_().mul_(self.scale).sub_(self.shift)
        return levels.masked_fill_(lost, self.rest)


class _Round(torch.autograd.Function):
    """Rounding to logarithmic levels, with ``s * dL/ds = sum(g * (x^ + shift) - g_x * (x + shift))``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log2_step: Tensor, grid: LogGrid, bits: Tensor, gradient_scale: Bound, kept: Tensor | None
    ) -> Tensor:
        """`x`, float32, rounded."""
        y = mixed(grid.rounded(x, bits), x, kept)
        ctx.save_for_backward(x, y, kept)
        ctx.grid, ctx.gradient_scale = grid, gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to `x` and to the logarithm of s."""
        (grad,), (x, y, kept) = grads, ctx.saved_tensors
        grad = grad.contiguous()
        to_x = mixed(inside_of_bounds(grad, x, *alike(-math.inf, ctx.grid.highest)), grad, kept)
        flat = [t.reshape(-1) for t in (grad, y, to_x, x)]
        derivative = torch.dot(*flat[:2]) - torch.dot(*flat[2:]) + ctx.grid.shift * (grad.sum() - to_x.sum())
        return to_x, derivative * math.log(2) * ctx.gradient_scale, None, None, None, None


class LogQuantizer(ActivationQuantizer):
    """An activation quantizer with logarithmic levels.

    In its state ``log2_step`` is the logarithm of s; ``log2_base``, that of the base, tells it from a uniform one.

    Args:
        spec: width; ``levels="log2"`` or ``"log"``.
        name: where it sits, for messages.
        tokens: as for an `ActivationQuantizer`.
    """

    log2_base: Tensor
    log_shift: Tensor
    log_rest: Tensor

    def __init__(self, spec: QuantSpec, name: str = "activation", *, tokens: bool = False) -> None:
        super().__init__(spec, name, tokens=tokens)
        self.fits_base = spec.levels == "log"
        self.register_buffer("log2_base", torch.ones(()))
        for part in (SHIFT, REST):
            self.register_buffer(part, torch.zeros(()), persistent=self.fits_base)
        self._grids: dict[int, LogGrid] = {}  # by width, of the values seen
        self._grids_of: Samples | None = None

    def set_estimator(self, value: str | Estimator) -> None:
        """Choose how gradients pass, and whether the largest level is learned.

        Raises:
            SpecError: for an estimator that learns widths, or changes gradients by the distance of two levels.
        """
        chosen = estimator(value).of_activations
        if "bits" in chosen.learns or chosen.changes_gradients:
            raise SpecError(
                f"{self.name} has logarithmic levels, which the estimator {value!r} does not know; "
                "use 'ste', 'lsq' or 'lsq_plus', or levels='uniform'"
            )
        super().set_estimator(chosen)

    @property
    def log_grid(self) -> LogGrid:
        """The levels, as they are now."""
        return LogGrid(self.step, self.log2_base, self.log_shift, self.log_rest)

    @torch.no_grad()
    def settle(self, widths: Tensor) -> None:
        """Change the width; the largest level stays, of "log" the smallest too."""
        if self.fits_base:
            old, new = (_gaps(bits) for bits in (self.bits, widths))
            self.log2_base.mul_(old / new)
            self.log_rest.mul_(widths > 0)
        self.bits.copy_(widths)
        self.final_bits = None
        self.refresh()

    def _set_range(self, samples: Samples, signed: bool, *, weights: bool) -> None:
        """Find the levels for the samples."""
        found = self._fitted(samples, float(self.bits.detach()))
        with torch.no_grad():
            self.log2_step.copy_(torch.log2(found.scale))
            self.zero_point.zero_()
            if self.fits_base:
                for part, value in ((BASE, found.base), (SHIFT, found.shift), (REST, found.rest * (self.bits > 0))):
                    getattr(self, part).copy_(torch.as_tensor(value))
        self.refresh()

    def _fitted(self, samples: Samples, bits: float) -> LogGrid:
        """The levels for values at a width."""
        high = samples.high[0].float().clamp(min=_LEAST)
        if self.fits_base:
            return _least_error(samples, bits)
        rounds = self.spec is not None and self.spec.power_of_two
        return LogGrid(torch.exp2(torch.log2(high).round()) if rounds else high, torch.ones_like(high))

    def grid(self, samples: Samples, signed: bool, bits: Tensor, *, weights: bool) -> tuple[Tensor, Tensor]:
        """The largest value s at each width of `bits`, whatever the rule, and no zero point; (C,) each."""
        scales = {width: self._fitted(samples, width).scale for width in set(bits.tolist())}
        return torch.stack([scales[width] for width in bits.tolist()]).to(bits), bits * 0

    def rounded_at(self, x: Tensor, bits: int) -> Tensor:
        """`x` at another width, with the levels of that width if the values that calibration saw are known."""
        if not check_bits(bits):
            return torch.zeros_like(x)
        grid = LogGrid(*(part.to(x) for part in self._at(bits)))  # type: ignore[union-attr]
        return grid.rounded(x, float(bits))

    def _at(self, bits: int) -> LogGrid:
        now = LogGrid(step_size(self.log2_step.detach()), self.log2_base, self.log_shift, self.log_rest)
        if not self.fits_base or self.seen is None:
            return now
        if self._grids_of is not self.seen:
            self._grids, self._grids_of = {}, self.seen
        if bits not in self._grids:
            self._grids[bits] = self._fitted(self.seen, bits)
        return self._grids[bits]

    def grids(self, bits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The largest value s at each width; 0 and 1, between which all levels are, over s; shape (len(bits),) each."""
        samples, _ = self.samples()
        widths = torch.tensor([float(check_bits(b)) for b in bits], device=samples.values.device)
        scale = self.grid(samples, False, widths, weights=False)[0]
        return scale, torch.zeros_like(scale), torch.ones_like(scale)

    @property
    def bounds(self) -> tuple[Bound, Bound, Bound]:
        """Lowest and highest level, over s, and no offset."""
        return 0.0, 1.0, 0.0

    def rounded_by(
        self, x: Tensor, log2_step: Tensor, *, kept: Tensor | None = None, gradient_scale: Bound = 1.0
    ) -> Tensor:
        """`x` rounded with another s, with gradients to both."""
        values, grid = x.float(), self.log_grid._replace(scale=step_size(log2_step.detach()))
        if not transforms_active() and torch.is_grad_enabled() and (values.requires_grad or log2_step.requires_grad):
            rounded: Tensor = _Round.apply(values, log2_step, grid, self.bits.detach(), gradient_scale, kept)
            return rounded.to(x.dtype)
        with torch.no_grad():
            rounded = grid.rounded(values.detach(), self.bits)
        if transforms_active():  # the same gradients, of operators
            scale = step_size(log2_step)
            scale = scale.detach() + (scale - scale.detach()) * gradient_scale
            below = values + scale * ((rounded - values) / grid.scale).detach()
            passed = torch.where(values < grid.highest, below, scale - self.log_shift)
            rounded = rounded + (passed - passed.detach())
        return (rounded if kept is None else torch.lerp(rounded, values, kept)).to(x.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        values_of_a_sample = x.numel() / max(x.shape[0], 1) if x.ndim else 1.0
        scale = self.estimator.gradient_scale(values_of_a_sample, 2 ** self.bits.detach() - 1)
        return self.rounded_by(x, self.log2_step, gradient_scale=scale)


def levels_in_state(state: Mapping[str, Any], name: str) -> LevelsName:
    """The kind of levels of the quantizer whose state is below `name`."""
    if f"{name}.{BASE}" not in state:
        return "uniform"
    return "log" if f"{name}.{SHIFT}" in state else "log2"


def _gaps(bits: Tensor) -> Tensor:
    """How many times the base lies between the largest and the smallest level."""
    return (torch.exp2(bits) - 2).clamp(min=1.0)


def _least_error(samples: Samples, bits: float) -> LogGrid:
    """The levels with the least squared error, each value's relative to the size of its token."""
    values, weights = _distinct(samples)
    shift = -values[0].clamp(max=0.0)
    last, gaps = 2.0**bits - 1, float(_gaps(torch.tensor(bits)))
    logs = torch.log2((values + shift).clamp_(min=_LEAST))
    grids, errors = [], []
    for scale in ((values[-1] + shift) * share for share in _SHARES):
        for octaves in _OCTAVES:
            base = torch.full_like(scale, octaves / gaps)
            codes = (torch.log2(scale.clamp(min=_LEAST)) - logs).div_(base).round_().clamp_(min=0.0)
            lost = codes >= last
            weights_of_rest = weights * lost
            rest = (values * weights_of_rest).sum() / weights_of_rest.sum().clamp(min=_LEAST)
            rounded = torch.exp2(codes * -base).mul_(scale).sub_(shift)
            errors.append((rounded.where(~lost, rest) - values).square_().mul_(weights).sum())
            grids.append(LogGrid(scale.clamp(min=_LEAST), base, shift, rest))
    return grids[int(torch.stack(errors).argmin())]


def _distinct(samples: Samples) -> tuple[Tensor, Tensor]:
    """Distinct values in order, and how much the error of each counts."""
    values = samples.values[0].float()
    found = samples.error_weights(2.0)
    weights = torch.ones_like(values) if found is None else found.float()
    distinct, index = values.unique(return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, index, weights)
