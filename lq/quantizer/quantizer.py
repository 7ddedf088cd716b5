"""The quantizer: a module that rounds one tensor to its grid, and carries the grid in its state.

State, of shape () per tensor or (C,) per channel, enough to run without knowing how it was made:

- ``log2_step``: the step as its logarithm. The step is positive whatever an optimizer does, and one learning rate
  means one relative change for every tensor (published LSQ ports let the step cross zero). NaN: no range yet;
  -inf: none because calibration did not come there.
- ``zero_point``, ``bits``: floats, because averages over integers (EMA callbacks) would truncate them, and because
  both can be learned. Learned widths are real numbers until `settle` makes them integers.

The range that calibration finds becomes step and zero point (`Levels.fit`); an estimator says what training moves: that
is a Parameter. All else is a buffer, so that no code which trains, decays, clips or unfreezes parameters moves a grid.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import SpecError
from lq.quantizer.estimators import STE, Estimator, estimator
from lq.quantizer.final_widths import FinalWidths
from lq.quantizer.functional import transforms_active
from lq.quantizer.histogram import raise_if_not_finite
from lq.quantizer.levels import middle, without_rounding_error
from lq.quantizer.ranges import Levels, Samples, range_rule
from lq.quantizer.rounding import Bound, step_size
from lq.quantizer.spec import QuantSpec, check_bits

#: The parts of a grid, by the names that they have in a state dict.
PARTS = ("log2_step", "zero_point", "bits")

# Zero points that differ by less are the same.
_SAME = 1e-3


class Quantizer(FinalWidths):
    """Rounds a tensor to a grid.

    Args:
        spec: widths, granularity, range rule.
        channels: number of channels with a step of their own; None for one step.
        name: where it sits, for messages.

    Raises:
        SpecError: if the widths do not fit the number of channels.
    """

    log2_step: Tensor
    zero_point: Tensor
    bits: Tensor

    #: Tells quantizers from a model's own modules where this class is not imported (`lq.structure`).
    is_lq_quantizer = True

    #: How often its widths have become others (`refresh`), for those who go by them and may not wait for a device.
    width_changes = 0
    _last_bits: Tensor | None = None

    #: Whether it rounds a weight. Grids of weights of which only the state is known count as symmetric.
    is_weight = True

    def __init__(self, spec: QuantSpec, channels: int | None = None, name: str = "") -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.spec: QuantSpec | None = spec
        self.name = name
        self.estimator: Estimator = STE()
        self._unreached = False
        self.macs: float | None = None  # multiply-accumulates per sample of the layer, once a batch was run
        #: Sees the tensor instead of it being rounded, and returns what flows on; None: round.
        self.tap: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("log2_step", torch.full(shape, torch.nan, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("bits", _widths(spec.bits, shape, name))
        self.refresh()

    @property
    def calibrated(self) -> bool:
        """Whether the grid has a range."""
        return self._calibrated

    @property
    def unreached(self) -> bool:
        """Whether it has no range because calibration did not come to it (`lq.quantizer.unreached`)."""
        return self._unreached and not self._calibrated

    @property
    def step(self) -> Tensor:
        """Distance of two levels, positive; shape () or (C,)."""
        return step_size(self.log2_step)

    def set_estimator(self, value: str | Estimator) -> None:
        """Choose how gradients pass, and what of the grid is learned.

        Args:
            value: an estimator or its name (`lq.quantizer.estimators`).

        Raises:
            SpecError: for another name, or when power-of-two steps should be learned.
        """
        chosen = estimator(value)
        chosen = chosen if self.is_weight else chosen.of_activations
        if chosen.learns and self.spec is not None and self.spec.power_of_two:
            raise SpecError(f"{self.name}: power-of-two steps cannot be learned; use estimator='ste'")
        self.estimator = chosen
        for part in PARTS:
            self._make_learned(part, part in chosen.learns and not (part == "zero_point" and self._spec_is_symmetric))
        parts = {part: self._buffers[part] for part in PARTS if part in self._buffers}
        self._buffers = {**parts, **self._buffers}  # in the order of a new one

    def _make_learned(self, part: str, learned: bool) -> None:
        """Have a part of the grid be a Parameter or a buffer; one that is so already stays the same tensor."""
        if (part in self._parameters) == learned:
            if learned:
                getattr(self, part).requires_grad_(True)
            return
        old = getattr(self, part)
        value = old.detach().clone()  # an optimizer may hold the old one
        delattr(self, part)
        if learned:
            self.register_parameter(part, nn.Parameter(value))
        else:
            old.requires_grad_(False)
            self.register_buffer(part, value)

    def set_bits(self, bits: int | tuple[int, ...]) -> None:
        """Change the width(s) and keep the range: the step grows as levels get fewer.

        Re-calibrating afterwards (`lq.calibrate`) finds the best range of the new width.
        """
        self.settle(_widths(bits, tuple(self.bits.shape), self.name).to(self.bits.device))

    @torch.no_grad()
    def settle(self, widths: Tensor) -> None:
        """Change widths to `widths`, shaped like ``bits``, and keep the range; the zero point becomes an integer."""
        old, new = (torch.exp2(b.clamp(min=1)) - 1 for b in (self.bits, widths))
        zero_point = (self.zero_point * new / old).round()
        signed_middle = (self.zero_point - middle(self.bits)).abs() < _SAME
        self.log2_step.add_(torch.log2(old / new))
        self.zero_point.copy_(torch.where(signed_middle, middle(widths), zero_point).where(widths > 0, 0.0))
        self.bits.copy_(widths)
        self.final_bits = None
        self.refresh()

    def extra_repr(self) -> str:
        """Widths and state, for ``print(model)``."""
        widths = sorted({int(b) for b in self.bits.flatten().tolist()})
        steps = "per tensor" if self.bits.ndim == 0 else f"{self.bits.numel()} channels"
        return f"bits={widths[0] if len(widths) == 1 else widths}, {steps}, calibrated={self._calibrated}"

    def grid(self, samples: Samples, signed: bool, bits: Tensor, *, weights: bool) -> tuple[Tensor, Tensor]:
        """Step and zero point that the spec's range rule finds for rows of `samples` at widths `bits`; (C,) each."""
        spec = self.spec or QuantSpec(8, symmetric=bool((self.zero_point == middle(self.bits)).all()))
        step = torch.empty_like(bits)
        zero_point = torch.empty_like(bits)
        low_bits = (bits < 8).cpu()
        # "auto" may mean another rule for each width: one call per rule, all channels of a rule together.
        rules = {low: range_rule(spec.range, bits=4 if low else 8, weights=weights) for low in (True, False)}
        for low, rule in rules.items():
            own = low_bits == low
            if own.all():
                levels = Levels(bits, spec.symmetric, signed, spec.power_of_two)
                return levels.fit(*rule(samples, levels))
            if own.any():
                rows = own.nonzero()[:, 0].to(bits.device)
                levels = Levels(bits[rows], spec.symmetric, signed, spec.power_of_two)
                step[rows], zero_point[rows] = levels.fit(*rule(replace(samples, values=samples.values[rows]), levels))
        return step, zero_point

    def _set_range(self, samples: Samples, signed: bool, *, weights: bool) -> None:
        """Pick the range of the samples by the spec's rule and turn it into step and zero point."""
        bits = self.bits.detach().reshape(-1).to(samples.values.device)
        step, zero_point = self.grid(samples, signed, bits, weights=weights)
        with torch.no_grad():
            self.log2_step.copy_(torch.log2(step).view(self.log2_step.shape))
            self.zero_point.copy_(zero_point.view(self.zero_point.shape))
        self.refresh()

    @property
    def _spec_is_symmetric(self) -> bool:
        """Whether the zero of the grid is fixed by what it was made for."""
        return self.is_weight if self.spec is None else self.spec.symmetric

    def refresh(self) -> None:
        """Read the state anew, after it was changed from outside: keep on the host what every forward needs.

        Averages of equal numbers can differ from them by a rounding error; widths and zero points are mended.
        """
        with torch.no_grad():
            log2_step, *parts = torch.stack([self.log2_step, self.bits, self.zero_point]).cpu()  # read once
            for part, read, unit in ((self.bits, parts[0], 1.0), (self.zero_point, parts[1], 0.5)):
                mended = without_rounding_error(read, unit)
                if not torch.equal(mended, read):
                    part.copy_(mended)
                    read.copy_(mended)
        bits, zero_point = parts
        if self._last_bits is None or not torch.equal(bits, self._last_bits):
            self._last_bits = bits.clone()
            self.width_changes += 1
        self._calibrated = bool(log2_step.isfinite().all())
        self._unreached = self._unreached or bool(log2_step.isneginf().any())
        self._pruned = not bool(bits.any())
        self._symmetric = self._spec_is_symmetric and bool(((zero_point - middle(bits)).abs() < _SAME).all())
        self._unsigned = not self._symmetric and not bool(zero_point.any())
        if not self._spec_is_symmetric:
            zero_point = zero_point.round()
        low, high = -zero_point, torch.exp2(bits) - 1 - zero_point
        uniform = low.numel() > 0 and bool((low == low.flatten()[0]).all() and (high == high.flatten()[0]).all())
        self._uniform = (float(low.flatten()[0]), float(high.flatten()[0])) if uniform else None

    @property
    def is_pruned(self) -> bool:
        """Whether all of its widths are 0."""
        return self._pruned

    @property
    def is_unsigned(self) -> bool:
        """Whether zero is the lowest level."""
        return self._unsigned

    @property
    def learns_offset(self) -> bool:
        """Whether the zero point is learned: by the estimator, and on a grid whose zero point follows the data."""
        return "zero_point" in self.estimator.learns and not (self._spec_is_symmetric or self._unsigned)

    def _grid(self) -> tuple[Tensor, Bound, Bound, Bound]:
        """Log-step, lowest and highest level (in steps) and offset; bounds are numbers if all channels agree."""
        learns_bits, learns_offset = "bits" in self.estimator.learns, self.learns_offset
        log2_step: Tensor = self.log2_step
        for part, learned in ((self.zero_point, learns_offset), (self.bits, learns_bits)):
            if part.requires_grad and not learned:
                log2_step = log2_step + 0.0 * part  # DDP wants whatever may be learned in the graph
        if self._uniform is not None and not learns_bits and not learns_offset:
            return log2_step, *self._uniform, self._uniform[0] % 1.0
        bits = self.bits if learns_bits else self.bits.detach()
        if self._unsigned:
            return log2_step, 0.0, torch.exp2(bits) - 1, 0.0
        zero: Tensor = self.zero_point.detach()
        if learns_offset:
            zero = self.zero_point + (zero.round() - self.zero_point).detach()
        elif learns_bits and self._symmetric:
            zero = middle(bits)
        elif not self._spec_is_symmetric:
            zero = zero.round()
        low = -zero
        # Below two bits levels go over from multiples of the step to those of the two-level grid.
        offset = torch.where(bits.detach() < 2, torch.remainder(low.detach(), 1.0), 0.0)
        return log2_step, low, torch.exp2(bits) - 1 - zero, offset

    @property
    def bounds(self) -> tuple[Bound, Bound, Bound]:
        """Lowest and highest level, in steps, and the offset of levels from multiples of the step; nothing learned."""
        with torch.no_grad():
            return self._grid()[1:]

    def _check_finite(self, x: Tensor) -> None:
        """Raise if `x` has NaN or Inf. A sum finds it at a fraction of a rounding's cost; on the CPU only: no syncs."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
            return
        if not math.isfinite(x.detach().sum().item()):
            raise_if_not_finite(x, self.name)

    def _apply(self, fn: Any, recurse: bool = True) -> "Quantizer":
        """Move, but keep float32: a step in half precision would be another grid."""
        return super()._apply(  # type: ignore[no-any-return]
            lambda t: t.to(device=fn(t).device) if t.is_floating_point() else fn(t), recurse
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies round."""
        return {**self.__dict__, "tap": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


def _widths(bits: int | tuple[int, ...], shape: tuple[int, ...], name: str) -> Tensor:
    """`bits` checked, as a float tensor of `shape`."""
    if not isinstance(bits, tuple):
        return torch.full(shape, float(check_bits(bits)), dtype=torch.float32)
    if (len(bits),) != shape:
        raise SpecError(f"{name}: {len(bits)} widths were given for {shape[0] if shape else 1} channels")
    return torch.tensor([float(check_bits(b)) for b in bits], dtype=torch.float32)
