"""Put quantizers on a model, take them off again, and change their widths and estimators.

The model stays what it was: same classes (``isinstance`` holds), same Parameter objects, same code
(`lq.attachment.placement`). `detach` is the exact inverse of `attach`.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lq.attachment.interception import (
    call_quantizers,
    remove_call_quantizers,
)
from lq.attachment.padded import keep_padded
from lq.attachment.placement import attach_sites, remove_checkpoint_hooks, remove_from_tensors, remove_from_weight
from lq.attachment.scheme import Override, Skip, Width, left_in_float, plan_sites
from lq.attachment.sites import (
    activation_quantizers,
    float_weight,
    is_attached,
    quantizers,
    require_attached,
    weight_quantizer,
)
from lq.attachment.stored import bake_calls, find_range
from lq.attachment.unseen import forget_left, watch_left
from lq.errors import StateError
from lq.quantizer.estimators import Estimator
from lq.quantizer.estimators import estimator as estimator_of
from lq.quantizer.spec import QuantSpec
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.patterns import select
from lq.structure.site import Site
from lq.structure.structure import Structure

M = TypeVar("M", bound=nn.Module)


def attach(
    model: M,
    weights: Width = 4,
    activations: Width = None,
    *,
    structure: Structure | None = None,
    skip: Skip = False,
    share_concats: bool = False,
    integer: bool = False,
    symmetric: bool = True,
    first_last: int | None = 8,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    overrides: Mapping[str, Override] | None = None,
    estimator: str | Estimator = "ste",
) -> M:
    """Quantize the weights, and on request the activations, of `model`, in place.

    Weight ranges are found at once; activations need `lq.calibrate` before the first forward.

    Args:
        model: any module. Without a structure its Conv1d/2d/3d, transposed convolution, Linear and Embedding layers
            are quantized, told by their class.
        weights: width in bits (0..8, 16), a `QuantSpec`, or None to leave weights in float.
        activations: the same for the input of each quantized layer and, given a structure, for the operands of products
            of activations: queries, keys, probabilities and values of attention.
        structure: what `lq.inspect` found, of this model or one like it: everything that multiplies is quantized,
            layers or not, and a tensor that several read is quantized once. Layers that the example did not reach
            (experts, heads that run in training only) are told by their class; not those of a part of the model that it
            never entered, such as a teacher, unless include or overrides name them.
        skip: also quantize what residual sums read besides others, and their results (BRECQ, QDrop); needs a structure.
            "auto": but for those that a layer norm reads: the streams of pre-norm transformers have few massive values
            that leave little of a grid to the others (ViT-tiny, W4A8: 79.4 % without, 3.8 % with them quantized).
        integer: also quantize, with 8 bits or more, what engines need that compute in integers: the network input, both
            operands and the results of residual sums, and what convolutions give to SiLUs, gates, pooling and the like
            (what a layer norm reads stays float); needs a structure.
        share_concats: one quantizer for all parts of a concatenation and for its result, as integer hardware without
            rescaling needs it; needs a structure.
        symmetric: zero is the middle level of every weight's grid; False gives each channel a zero point of its own,
            which at few bits is nearer to the weights (BRECQ, QDrop).
        first_last: least width of the first and last layers' weights and of the last layer's input; None: no exception.
            The network's own input stays float.
        include: name patterns (``*``, ``?``; a module's name covers what is inside) of the only layers to quantize.
            Calls are named as `lq.inspect` shows them, such as ``blocks.0.attn.matmul_1``. Without a structure, layers
            of other kinds that have a ``weight`` of two or more dimensions can be named too.
        exclude: name patterns of layers to leave in float.
        overrides: other widths by name pattern, such as ``{"layer4": {"weights": 2}}``; the last match wins.
        estimator: how gradients pass the rounding, and what of the grid is learned: one of `lq.quantizer.estimators`,
            or its
            name: "ste", "lsq", "lsq_plus", "ewgs", "adaptive_ewgs", "noise_scale".

    Returns:
        The model.

    Raises:
        SpecError: for a width that does not exist.
        PatternError: for a pattern that matches no layer.
        StateError: if the model has quantizers already, or no layer to quantize.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> attach(model, weights=2, first_last=None)[0].weight[0].unique().numel() <= 4
    True
    """
    if is_attached(model):
        raise StateError("the model has quantizers already; lq.detach(model) first, or change widths with lq.set_bits")
    plan = plan_sites(
        model,
        weights,
        activations,
        structure=structure,
        skip=skip,
        share_concats=share_concats,
        integer=integer,
        symmetric=symmetric,
        first_last=first_last,
        include=include,
        exclude=exclude,
        overrides=overrides,
    )
    if not plan:
        raise StateError(
            f"{type(model).__name__} has no layer to quantize; attach after its layers are built, "
            "or name layers of other kinds with include="
        )
    try:
        attach_sites(model, plan, places=None if structure is None else structure.places)
        set_estimator(model, estimator)
        if structure is not None:
            watch_left(model, left_in_float(model, structure, include, exclude, overrides))
    except Exception:
        if is_attached(model):
            detach(model)
        raise
    return model


def detach(model: M, bake: bool = False) -> M:
    """Take the quantizers off `model`, in place.

    Args:
        model: a model with quantizers.
        bake: False gives back the float weights, bit for bit, and removes every quantizer. True leaves the quantized
            values in the weights and keeps the quantizers that no weight can stand for: those of activations, and of
            weights that functions compute first or that something reads in float as well. The forward stays the
            quantized one, bit for bit. A second ``detach(model)`` removes those too.

    Returns:
        The model.

    Raises:
        StateError: if the model has no quantizers.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> before = model[0].weight
    >>> detach(attach(model))[0].weight is before
    True
    """
    require_attached(model, "lq.detach")
    if bake:
        bake_calls(model)
    for module in list(model.modules()):
        remove_from_weight(module, bake)
        if not bake:
            remove_from_tensors(module)
    if not bake:
        remove_call_quantizers(model)
    for module in model.modules():
        forget_left(module)
        remove_checkpoint_hooks(module)
    keep_padded(model)
    return model


def attached_plan(model: nn.Module) -> dict[str, QuantSpec] | None:
    """The spec of each quantizer, by site; None if the quantizers were built from a checkpoint."""
    tied = {f"{name}.weight": found for name, module in model.named_modules() if (found := weight_quantizer(module))}
    plan = {}
    for name, quantizer in [*((q.name, q) for q in quantizers(model)), *tied.items()]:
        if quantizer.spec is None:
            return None
        plan[name] = quantizer.spec
    return plan


def set_estimator(model: nn.Module, estimator: str | Estimator) -> None:
    """Choose how gradients pass all quantizers: an estimator of `lq.quantizer.estimators`, or its name."""
    require_attached(model, "lq.set_estimator")
    chosen = estimator_of(estimator)
    for quantizer in quantizers(model):
        quantizer.set_estimator(chosen)


def set_bits(
    model: nn.Module, weights: Mapping[str, int | Sequence[int]], activations: Mapping[str, int] | None = None
) -> None:
    """Change widths and find the ranges of the new widths.

    Activations get the range that fits the values `lq.calibrate` has seen; those of a model that was loaded, not
    calibrated, keep the range they have.

    Args:
        model: a model with quantizers.
        weights: width, or one width per output channel (0 prunes it), by name pattern of layers; of a call with
            several weights also by operand, such as ``"lstm.rnn_0_weight_1"``.
        activations: width, by name pattern of sites such as ``"layer1.0.conv1.input"``, or of modules around them.

    Raises:
        PatternError: for a pattern that matches no layer with a quantized weight, or no activation.
        SpecError: for a width that does not exist, or a wrong number of widths.

    >>> model = attach(nn.Sequential(nn.Linear(4, 3)), first_last=None)
    >>> set_bits(model, {"0": [4, 2, 0]})
    >>> model[0].weight[2].abs().max().item()
    0.0
    """
    require_attached(model, "lq.set_bits")
    named = {name: found for name, module in model.named_modules() if (found := weight_quantizer(module)) is not None}
    at_calls: dict[str, list[tuple[WeightQuantizer, nn.Module]]] = {}  # by call, and by the call's operand
    for name, module in model.named_modules():
        for place, quantizer in call_quantizers(module).items():
            if isinstance(quantizer, WeightQuantizer):
                site = Site(name, place, "weight")
                for key in (site.layer, site.name):
                    at_calls.setdefault(key, []).append((quantizer, module))
    for pattern, widths in weights.items():
        given = widths if isinstance(widths, int) else tuple(widths)
        for name in select(pattern, [*named, *at_calls], argument="set_bits"):
            for at_call, owner in at_calls.get(name, []):
                at_call.set_bits(given)
                at_call.outdated = not find_range(at_call, owner)
            weight = float_weight(model.get_submodule(name)) if name in named else None
            if weight is not None:
                named[name].set_bits(given)
                named[name].calibrate(weight)
    sites = activation_quantizers(model)
    for pattern, width in (activations or {}).items():
        for name in select(pattern, sites, argument="set_bits"):
            sites[name].set_bits(width)
            if sites[name].seen is not None:
                sites[name].refit()
