"""What a quantizer is: widths, granularity, grid and range rule, as one frozen value.

A grid of ``b`` bits has the codes ``0 .. 2**b - 1`` and represents ``(q - z) * s``. Signed symmetric grids have the
zero point ``z = 2**(b-1)``, unsigned ones ``z = 0``, asymmetric ones whatever their range asks for. Two widths are
special: 0 bits is a pruned channel (exactly zero), 1 bit a two-level one (``-s/2`` and ``+s/2`` when symmetric).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lq.errors import SpecError
from lq.files.schema import MismatchError
from lq.quantizer.ranges import RangeRule, range_rule

#: How levels are spaced.
LevelsName = Literal["uniform", "log2", "log"]

#: The bit-widths a grid can have.
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 16)


def check_bits(bits: object) -> int:
    """Return `bits` if it is a width a grid can have.

    Raises:
        SpecError: for anything but an integer in 0..8 or 16.

    >>> check_bits(4)
    4
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in WIDTHS:
        raise SpecError(f"bits={bits!r} is not a width; use an integer from 0 to 8, or 16")
    return bits


def width_in_file(value: Any) -> int:
    """`check_bits` as a check of values from files (`lq.files.schema`)."""
    try:
        return check_bits(value)
    except SpecError as error:
        raise MismatchError("a width, an integer from 0 to 8 or 16", value) from error


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Args:
        bits: width in bits (0..8 or 16), or one width per channel.
        per_channel: one step per output channel instead of one per tensor.
        symmetric: the zero of the grid is fixed; otherwise a zero point follows the data (if they have both signs).
        signed: whether values have both signs; None looks at the data.
        range: rule that picks the clipping range, an object or one of "auto", "minmax", "percentile", "lp", "lsq",
            "output". "auto" takes min-max at 8 bits and more and the L_p error with p = 2.4 below; "output" goes on
            from there by the error of what the layer or product gives (`lq.calibration.output_ranges`).
        power_of_two: round each step to a power of two.
        levels: "uniform"; or logarithmic, of activations (`lq.quantizer.log_quantizer`): "log2", which halve, for what
            a softmax gives; "log", with a base and a shift that fit the values, for what a GELU or SiLU gives, too.
        outliers: width of an activation whose few large values leave too little of `bits` to the others: where rounding
            changes it by more than a hundredth of its power (each value's relative to its token); None: `bits` always.

    Raises:
        SpecError: for a width that does not exist, widths per channel without ``per_channel``, or other levels.

    >>> QuantSpec(4).bits
    4
    >>> QuantSpec(9)
    Traceback (most recent call last):
    ...
    lq.errors.SpecError: bits=9 is not a width; use an integer from 0 to 8, or 16
    """

    bits: int | tuple[int, ...]
    per_channel: bool = True
    symmetric: bool = True
    signed: bool | None = None
    range: str | RangeRule = "auto"
    power_of_two: bool = False
    levels: LevelsName = field(default="uniform", kw_only=True)
    outliers: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.levels not in get_args(LevelsName):
            raise SpecError(f"levels={self.levels!r} is unknown; use one of {get_args(LevelsName)}")
        if self.levels != "uniform" and self.per_channel:
            raise SpecError(
                f"levels={self.levels!r} is for activations, which are quantized per tensor; set per_channel=False"
            )
        if self.outliers is not None and (check_bits(self.outliers) and self.per_channel):
            raise SpecError("outliers= is for activations, which are quantized per tensor; set per_channel=False")
        if self.levels == "log" and self.power_of_two:
            raise SpecError("levels='log' has no power_of_two: its base is any number; use levels='log2'")
        if isinstance(self.bits, Sequence) and not isinstance(self.bits, str):
            if not self.per_channel:
                raise SpecError(f"{len(self.bits)} widths were given for one tensor; set per_channel=True")
            object.__setattr__(self, "bits", tuple(check_bits(b) for b in self.bits))
        else:
            check_bits(self.bits)
        range_rule(self.range, bits=8)  # an unknown rule is an error here, not at calibration

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths as a tuple: one entry, or one per channel."""
        return self.bits if isinstance(self.bits, tuple) else (self.bits,)

    def at_least(self, bits: int) -> "QuantSpec":
        """This spec with every width raised to `bits`; pruned channels stay pruned.

        >>> QuantSpec(4).at_least(8).bits
        8
        """
        raised = tuple(max(b, bits) if b else 0 for b in self.widths)
        return replace(self, bits=raised if isinstance(self.bits, tuple) else raised[0])


def weight_spec(value: int | QuantSpec, symmetric: bool = True, range: str | RangeRule = "auto") -> QuantSpec:
    """A spec for weights: per output channel, signed; with a zero point for each channel unless symmetric."""
    return value if isinstance(value, QuantSpec) else QuantSpec(value, symmetric=symmetric, signed=True, range=range)


def activation_spec(value: int | QuantSpec, range: str | RangeRule = "auto", outliers: int | None = None) -> QuantSpec:
    """A spec for activations: per tensor; unsigned if the data are, else with a zero point."""
    if not isinstance(value, QuantSpec):
        return QuantSpec(value, per_channel=False, symmetric=False, range=range, outliers=outliers)
    if value.per_channel:
        raise SpecError("activations are quantized per tensor; use QuantSpec(..., per_channel=False)")
    return value
