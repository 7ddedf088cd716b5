"""The options of `lq.attach` and of `lq.callbacks.Quantize`: their names, defaults, texts and checks, written once."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from typing_extensions import Self

from lq.errors import SpecError
from lq.options import after
from lq.quantizer.estimators import Estimator
from lq.quantizer.estimators import estimator as estimator_of
from lq.quantizer.spec import LevelsName, QuantSpec, activation_spec, check_bits, weight_spec
from lq.quantizer.targets import TargetName, target_of
from lq.structure.forward import Forward
from lq.structure.structure import Structure

#: A width in bits, a full spec, or None for float.
Width = int | QuantSpec | None

#: Whether residual streams are quantized; "auto": those that no layer norm reads.
Skip = bool | Literal["auto"]


class Override(TypedDict, total=False):
    """Other widths for the layers that a pattern matches."""

    weights: Width
    activations: Width


@dataclass(frozen=True)
class SiteOptions:
    """Which tensors of a model are quantized, and how.

    Args:
        weights: width in bits (0..8, 16), a `QuantSpec`, or None to leave weights in float.
        activations: the same for the input of each quantized layer and, where the structure is known, for the operands
            of products of activations: queries, keys, probabilities and values of attention.
        structure: what `lq.inspect` found, of this model or one like it, or the path of one saved as JSON: everything
            that multiplies is quantized, layers or not, and a tensor that several read is quantized once. Layers that
            the example did not reach (experts, heads that run in training only) are told by their class; not those of
            a part of the model that it never entered, such as a teacher, unless include or overrides name them.
        skip: also quantize what residual sums read besides others, and their results (BRECQ, QDrop); needs a structure.
            "auto": but for those that a layer norm reads: the streams of pre-norm transformers have few massive values
            that leave little of a grid to the others (ViT-tiny, W4A8: 79.4 % without, 3.8 % with them quantized).
        share_concats: one quantizer for all parts of a concatenation and for its result, as integer hardware without
            rescaling needs it; needs a structure.
        integer: also quantize, with 8 bits or more, what engines need that compute in integers: the network input, both
            operands and the results of residual sums, and what convolutions give to SiLUs, gates, pooling and the like
            (what a layer norm reads stays float); needs a structure.
        symmetric: zero is the middle level of every weight's grid; False gives each channel a zero point of its own,
            which at few bits is nearer to the weights (BRECQ, QDrop).
        range: rule that finds ranges, for widths given as numbers: "auto", "minmax", "percentile", "lp", "lsq" or
            "output" (see `QuantSpec`); "output" needs `lq.calibrate` for weights, too.
        probabilities: levels of what a softmax gives, as attention weighs values by: "uniform"; "log2", which halve, or
            "log" (`QuantSpec`): most probabilities are tiny. Engines compute those in float. Needs a structure.
        gelu: levels of what a GELU or SiLU gives: "uniform" or "log" (`QuantSpec`), for fewer than 8 bits: most values
            are close to zero, a few are large. Engines compute those in float. Needs a structure.
        outliers: width of activations whose few large values leave too little of `activations` to the others, such as
            16 for 8 bits (`QuantSpec`); in ViT-tiny one of 97. Engines compute what reads them in float.
        first_last: least width of the first and last layers' weights and of the last layer's input; None: no exception.
            The network's own input stays float.
        include: name patterns (``*``, ``?``; a module's name covers what is inside) of the only layers to quantize.
            Calls are named as `lq.inspect` shows them, such as ``blocks.0.attn.matmul_1``. Without a structure, layers
            of other kinds that have a ``weight`` of two or more dimensions can be named too.
        exclude: name patterns of layers to leave in float.
        overrides: other widths by name pattern, such as ``{"layer4": {"weights": 2}}``; the last match wins.
        target: the engine that will run the exported network: "onnxruntime", "openvino" or "tensorrt" (by its
            documents, not tried). What it does not run is an error before anything is trained, what it computes in
            float a warning; a width alone means the grid that it computes with (`lq.quantizer.targets`).

    Raises:
        SpecError: for a width that does not exist, or another option that is unknown.

    >>> SiteOptions(weights=9)
    Traceback (most recent call last):
    ...
    lq.errors.SpecError: bits=9 is not a width; use an integer from 0 to 8, or 16
    """

    weights: Width = 8
    activations: Width = 8
    _: KW_ONLY
    structure: Structure | str | Path | None = None
    skip: Skip = False
    share_concats: bool = False
    integer: bool = False
    symmetric: bool = True
    range: str = "auto"
    probabilities: LevelsName = "uniform"
    gelu: Literal["uniform", "log"] = "uniform"
    outliers: int | None = None
    first_last: int | None = 8
    include: Sequence[str] | str | None = None
    exclude: Sequence[str] | str | None = None
    overrides: Mapping[str, Override] | None = None
    target: TargetName | None = None

    def __post_init__(self) -> None:
        target_of(self.target)
        self.weight_spec(self.weights)
        self.activation_spec(self.activations)
        if self.first_last is not None:
            check_bits(self.first_last)
        if self.outliers is not None:
            check_bits(self.outliers)
        if self.skip not in (True, False, "auto"):
            raise SpecError(f"skip={self.skip!r} is unknown; use True, False or 'auto'")
        for name, kinds in (("probabilities", get_args(LevelsName)), ("gelu", ("uniform", "log"))):
            if getattr(self, name) not in kinds:
                raise SpecError(f"{name}={getattr(self, name)!r} is unknown; use one of {kinds}")
        for pattern, override in (self.overrides or {}).items():
            if not isinstance(override, Mapping) or not override or set(override) - {"weights", "activations"}:
                raise SpecError(
                    f"overrides[{pattern!r}]={override!r}; expected a mapping with 'weights' and/or 'activations', "
                    "such as {'weights': 2}"
                )
            self.weight_spec(override.get("weights"))
            self.activation_spec(override.get("activations"))

    def weight_spec(self, width: Width) -> QuantSpec | None:
        """The spec of a weight of that width; None: it stays float."""
        return None if width is None else weight_spec(width, self.symmetric, self.range)

    def activation_spec(self, width: Width) -> QuantSpec | None:
        """The spec of an activation of that width; None: it stays float."""
        target = target_of(self.target)
        if target is not None and target.signed and isinstance(width, int):
            more: dict[str, Any] = {"range": self.range, "outliers": self.outliers}
            width = QuantSpec(width, per_channel=False, symmetric=True, signed=True, **more)
        return None if width is None else activation_spec(width, self.range, self.outliers)

    @property
    def needs_structure(self) -> str:
        """The first option that was given and needs a structure, such as ``skip=True``; empty if there is none."""
        if self.skip:
            return f"skip={self.skip!r}"
        for name in ("probabilities", "gelu"):
            if getattr(self, name) != "uniform":
                return f"{name}={getattr(self, name)!r}"
        return "share_concats=True" if self.share_concats else "integer=True" if self.integer else ""

    def read_structure(self) -> Structure | None:
        """The structure that was given, read from its file if it is a path."""
        if self.structure is None or isinstance(self.structure, Structure):
            return self.structure
        return Structure.load(self.structure)

    def with_structure(self, structure: Structure | None) -> Self:
        """These options with the structure of a model; without those that need one if none is known."""
        if structure is None:
            plain: dict[str, Any] = {"skip": False, "share_concats": False, "integer": False}
            return replace(self, structure=None, probabilities="uniform", gelu="uniform", **plain)
        return replace(self, structure=structure)


@dataclass(frozen=True)
class AttachOptions(SiteOptions):
    """The options of `lq.attach`.

    Args:
        estimator: how gradients pass the rounding, and what of the grid is learned: one of `lq.quantizer.estimators`,
            or its name: "ste", "lsq", "lsq_plus", "ewgs", "adaptive_ewgs", "noise_scale",
            "stableqat".
    """

    weights: Width = 4
    activations: Width = None
    estimator: str | Estimator = field(default="ste", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        estimator_of(self.estimator)


@dataclass(frozen=True)
class QuantizeOptions(SiteOptions):
    """The options of `lq.callbacks.Quantize`.

    Args:
        structure: a `Structure`, or the path of one saved as JSON, instead of running the module once; its names may
            start at a submodule.
        fold_bn: fold BatchNorms into the convolutions that are quantized. "auto" folds them if the Trainer fits without
            training (``max_epochs=0``), as post-training work wants it, and keeps them otherwise: training at few bits
            loses points without them, and exports fold those that are left. A checkpoint decides for itself.
        prepare: rescale, exactly, what norms give and the layers behind read, for few bits (see `lq.prepare`): "auto"
            where it gets fewer than 8 bits, True everywhere; ``preparation.report`` says what was done.
        calibration_samples: training samples to calibrate on, over all ranks.
        forward: called with the module and a batch to calibrate with. By default the module's
            ``calibration_step(batch)`` if it has one; else its forward on the batch, on the first part of it or, of a
            dict, on the parts that its parameters are named like; else, where that fails, what its ``training_step``
            calls (in eval mode, without gradients, nothing is logged).
    """

    fold_bn: bool | Literal["auto"] = field(default="auto", kw_only=True, metadata=after("symmetric"))
    prepare: bool | Literal["auto"] = field(default=False, kw_only=True, metadata=after("fold_bn"))
    calibration_samples: int = field(default=512, kw_only=True)
    forward: Forward | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.calibration_samples < 1:
            raise SpecError(f"calibration_samples={self.calibration_samples}; calibration needs at least 1")
        if self.fold_bn not in (True, False, "auto"):
            raise SpecError(f"fold_bn={self.fold_bn!r} is unknown; use True, False or 'auto'")
        if self.prepare not in (True, False, "auto"):
            raise SpecError(f"prepare={self.prepare!r} is unknown; use True, False or 'auto'")
        super().__post_init__()
