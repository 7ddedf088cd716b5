"""Engines that run exported files: what each computes in integers, what in float, and what it refuses.

One table, `TARGETS`, has a `Target` for each engine: its rules about grids (a grid that no rule names is computed in
integers), and how a file has to be written for it. All of them take one step for a weight or one for each output
channel, one step for an activation, and any steps, powers of two or not.

Where the table comes from:

- onnxruntime: files run in 1.32 (CPU), operators of its optimized graph counted (`lq.export.running`).
- OpenVINO: files run in 2026.4 (CPU), kernels read from its runtime model. It reads no types of 2 bits. A weight with
  zero points whose levels do not fit 8 signed bits is turned into floats.
- TensorRT: by NVIDIA's documents, run by nobody here. "The quantization scheme is symmetric" and INT4 is for weights
  alone, in blocks (TensorRT 11, Working with Quantized Types); INT8 is ``clip(round(x / s), -128, 127) * s``
  (Quantization Schemes); ``y_zero_point must be 0``, UINT8 only at inputs and outputs of the network, Clip and Cast not
  of INT8, opset 9 to 20 in 10.0 (onnx-tensorrt, docs/operators.md) and up to 25 in 11 (ONNX Opset Guide);
  "activations-quantization does not support per-axis quantization" (onnx-tensorrt, onnxOpImporters.cpp).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lq.errors import SpecError
from lq.quantizer.spec import WIDTHS, QuantSpec

#: The engines, by name.
TargetName = Literal["onnxruntime", "openvino", "tensorrt"]

#: Where the zero of a grid lies: at its lowest level, between its two halves, or at any level.
Zero = Literal["lowest", "middle", "anywhere"]

# How many names a message lists.
_FEW = 3


@dataclass(frozen=True)
class Grid:
    """What is known of the grid of a tensor.

    Args:
        is_weight: whether the tensor is a weight.
        widths: its widths in bits; several if channels differ.
        zeros: where its zero may lie; one place if that is known.
        logarithmic: whether its levels are (``levels="log2"``), which files have as operators in float.
    """

    is_weight: bool
    widths: tuple[int, ...]
    zeros: frozenset[Zero]
    logarithmic: bool = False

    @classmethod
    def of(cls, spec: QuantSpec, *, is_weight: bool) -> "Grid":
        """What a spec says, before any data are seen.

        >>> sorted(Grid.of(QuantSpec(8), is_weight=True).zeros)
        ['lowest', 'middle']
        """
        free: Zero = "middle" if spec.symmetric else "anywhere"
        zeros: dict[bool | None, set[Zero]] = {None: {"lowest", free}, True: {free}, False: {"lowest"}}
        return cls(is_weight, spec.widths, frozenset(zeros[spec.signed]), spec.levels != "uniform")


@dataclass(frozen=True)
class Rule:
    """Grids that an engine does not compute with in integers.

    Args:
        refused: whether it refuses them; otherwise it computes with them in float, right but not fast.
        of_weights: whether it is about weights; otherwise about activations.
        what: what these grids are, behind "have", such as "16 bits".
        instead: which option to give.
        widths: widths in bits that it is about.
        zeros: places of zero that it is about.
        logarithmic: whether it is about logarithmic levels, and those alone.
    """

    refused: bool
    of_weights: bool
    what: str
    instead: str
    widths: tuple[int, ...] = WIDTHS
    zeros: tuple[Zero, ...] = ("lowest", "middle", "anywhere")
    logarithmic: bool = False

    def hits(self, grid: Grid) -> bool:
        """Whether a grid is one of these: refused ones if they may be, others if they are for certain."""
        if (grid.is_weight, grid.logarithmic) != (self.of_weights, self.logarithmic):
            return False
        if not set(grid.widths) & set(self.widths):
            return False
        return bool(grid.zeros & set(self.zeros)) if self.refused else grid.zeros <= set(self.zeros)


@dataclass(frozen=True)
class Target:
    """An engine.

    Args:
        name: its name.
        tried: version that files were run in; "": none, the rules are those of its documents.
        rules: grids that are not computed with in integers.
        without_integer: what stays float without ``integer=True``.
        opsets: oldest and newest version of ONNX's operators that it reads, of those that lq writes.
        opset: version to write unless another is asked for; None: as without a target.
        least_stored: bits of the smallest type of weights that it reads.
        as_read: whether it wants weights that take 8 bits stored as it multiplies them: OpenVINO computes in float, or
            fails, where they are computed from other integers of 8 bits.
        signed: whether its activations are INT8 with zero in the middle, and a width alone asks for that.
    """

    name: TargetName
    tried: str
    rules: tuple[Rule, ...]
    without_integer: str
    opsets: tuple[int, int]
    opset: int | None = None
    least_stored: int = 2
    as_read: bool = False
    signed: bool = False

    def refuse(self, grids: Mapping[str, Grid]) -> None:
        """Raise if the engine does not run some of the grids, by name of the tensor.

        Raises:
            SpecError: with all rules that are broken.
        """
        found = self._said(grids, refused=True)
        if found:
            raise SpecError(f"target={self.name!r} does not run this network: {'; '.join(found)}")

    def in_float(self, grids: Mapping[str, Grid]) -> list[str]:
        """What the engine computes in float, and what to do about it; a phrase for each rule."""
        return self._said(grids, refused=False)

    def _said(self, grids: Mapping[str, Grid], *, refused: bool) -> list[str]:
        found = []
        for rule in self.rules:
            names = [name for name, grid in grids.items() if rule.refused == refused and rule.hits(grid)]
            if names:
                tensors = "weight" if rule.of_weights else "activation"
                have = f"{tensors} has" if len(names) == 1 else f"{tensors}s have"
                found.append(f"{len(names)} {have} {rule.what} ({listed(names)}): use {rule.instead}")
        return found


_EIGHT = "QuantSpec(8, per_channel=False, symmetric=True, signed=True)"
_FIRST = "the first layer, which reads the network's input"

_LOGARITHMIC = Rule(
    False, False, "logarithmic levels", 'levels="uniform", probabilities="uniform", gelu="uniform"', logarithmic=True
)

#: All engines, by name.
TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        "onnxruntime",
        tried="1.32",
        rules=(
            Rule(False, True, "16 bits", "weights=8 or fewer", widths=(16,)),
            Rule(False, False, "16 bits", "activations=8 or fewer", widths=(16,)),
            _LOGARITHMIC,
            Rule(
                False,
                False,
                "room for both signs even where no value is negative, which keeps a ReLU before them apart from its "
                "convolution",
                "QuantSpec(..., signed=None)",
                zeros=("middle",),
            ),
        ),
        without_integer=f"{_FIRST}, and convolutions whose results nothing quantizes",
        opsets=(13, 27),
    ),
    "openvino": Target(
        "openvino",
        tried="2026.4",
        rules=(
            Rule(False, True, "16 bits", "weights=8 or fewer", widths=(16,)),
            Rule(False, False, "16 bits", "activations=8 or fewer", widths=(16,)),
            _LOGARITHMIC,
            Rule(
                False,
                True,
                "8 bits with zero points of their own",
                "symmetric=True, or fewer bits",
                widths=(8,),
                zeros=("lowest", "anywhere"),
            ),
        ),
        without_integer=_FIRST,
        opsets=(13, 27),
        opset=21,
        least_stored=4,
        as_read=True,
    ),
    "tensorrt": Target(
        "tensorrt",
        tried="",
        rules=(
            Rule(True, True, "16 bits", "weights=8 or fewer", widths=(16,)),
            Rule(
                True,
                True,
                "zero points of their own",
                "symmetric=True, or QuantSpec(..., symmetric=True, signed=True)",
                zeros=("lowest", "anywhere"),
            ),
            _LOGARITHMIC,
            Rule(True, False, "other widths than 8 bits", "activations=8", widths=tuple({*WIDTHS} - {8})),
            Rule(
                True,
                False,
                "their zero elsewhere than in the middle",
                f'activations=8 with target="tensorrt", or {_EIGHT}',
                zeros=("lowest", "anywhere"),
            ),
        ),
        without_integer=_FIRST,
        opsets=(13, 25),
        opset=20,
        least_stored=8,
        as_read=True,
        signed=True,
    ),
}


def target_of(name: str | None) -> Target | None:
    """The engine of that name; None: none.

    Raises:
        SpecError: for another name.

    >>> target_of("tensort")
    Traceback (most recent call last):
    ...
    lq.errors.SpecError: target='tensort' is unknown; did you mean 'tensorrt'? Use onnxruntime, openvino or tensorrt
    """
    if name is None:
        return None
    if name not in TARGETS:
        near = get_close_matches(str(name), TARGETS, n=1)
        meant = f"; did you mean {near[0]!r}? Use" if near else "; use"
        raise SpecError(f"target={name!r} is unknown{meant} {', '.join(list(TARGETS)[:-1])} or {list(TARGETS)[-1]}")
    return TARGETS[name]


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    given = list(names)
    return ", ".join(given[:_FEW]) + (f" and {len(given) - _FEW} more" if len(given) > _FEW else "")
