"""Put quantizers on a model, take them off again, and change their widths and estimators.

The model stays what it was: same classes (``isinstance`` holds), same Parameter objects, same code
(`lq.attachment.placement`). `detach` is the exact inverse of `attach`.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lq.attachment.interception import call_quantizers, remove_call_quantizers
from lq.attachment.options import AttachOptions, SiteOptions
from lq.attachment.padded import keep_padded
from lq.attachment.placement import attach_sites, remove_checkpoint_hooks, remove_from_tensors, remove_from_weight
from lq.attachment.scheme import left_in_float, plan_sites
from lq.attachment.sites import (
    activation_quantizers,
    float_weight,
    is_attached,
    quantizers,
    require_attached,
    weight_quantizer,
)
from lq.attachment.stored import bake_calls, find_range
from lq.attachment.targets import check_plan
from lq.attachment.unseen import forget_left, watch_left
from lq.errors import StateError
from lq.options import takes
from lq.quantizer.estimators import Estimator
from lq.quantizer.estimators import estimator as estimator_of
from lq.quantizer.spec import QuantSpec
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.patterns import select
from lq.structure.site import Site

M = TypeVar("M", bound=nn.Module)


@takes(AttachOptions)
def attach(model: M, options: AttachOptions) -> M:
    """Quantize the weights, and on request the activations, of `model`, in place.

    Weight ranges are found at once; activations need `lq.calibrate` before the first forward. Without a structure the
    Conv1d/2d/3d, transposed convolution, Linear and Embedding layers are quantized, told by their class.

    Args:
        model: any module.
        options: those of `AttachOptions`, each a keyword argument.

    Returns:
        The model.

    Raises:
        SpecError: for a width that does not exist, or grids that `target` does not run.
        PatternError: for a pattern that matches no layer.
        StateError: if the model has quantizers already, or no layer to quantize.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> attach(model, weights=2, first_last=None)[0].weight[0].unique().numel() <= 4
    True
    """
    return attach_by(model, options, options.estimator)


def attach_by(model: M, options: SiteOptions, estimator: str | Estimator = "ste") -> M:
    """As `attach`, with all options as one."""
    if is_attached(model):
        raise StateError("the model has quantizers already; lq.detach(model) first, or change widths with lq.set_bits")
    structure = options.read_structure()
    options = options if structure is None else options.with_structure(structure)
    plan = plan_sites(model, options)
    if not plan:
        raise StateError(
            f"{type(model).__name__} has no layer to quantize; attach after its layers are built, "
            "or name layers of other kinds with include="
        )
    check_plan(plan, options)
    try:
        attach_sites(model, plan, places=None if structure is None else structure.places)
        set_estimator(model, estimator)
        if structure is not None:
            watch_left(model, left_in_float(model, structure, options))
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
    tied = {f"{name}.weight": q for name, module in model.named_modules() if (q := weight_quantizer(module))}
    plan = {}
    for name, quantizer in [*((q.name, q) for q in quantizers(model)), *tied.items()]:
        if quantizer.spec is None:
            return None
        plan[name] = quantizer.spec
    return plan


def set_estimator(model: nn.Module, estimator: str | Estimator) -> None:
    """Choose how gradients pass all quantizers: an estimator of `lq.quantizer.estimators`, or its name."""
    require_attached(model, "lq.set_estimator")
    estimator = estimator_of(estimator)
    for quantizer in quantizers(model):
        quantizer.set_estimator(estimator)


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
    named = {name: q for name, module in model.named_modules() if (q := weight_quantizer(module)) is not None}
    at_calls: dict[str, list[tuple[WeightQuantizer, nn.Module]]] = {}  # by call, and by the call's operand
    for name, module in model.named_modules():
        for place, quantizer in call_quantizers(module).items():
            if isinstance(quantizer, WeightQuantizer):
                site = Site(name, place, "weight")
                for key in (site.layer, site.name):
                    at_calls.setdefault(key, []).append((quantizer, module))
    for pattern, widths in weights.items():
        bits = widths if isinstance(widths, int) else tuple(widths)
        for name in select(pattern, [*named, *at_calls], argument="set_bits"):
            for at_call, owner in at_calls.get(name, []):
                at_call.set_bits(bits)
                at_call.outdated = not find_range(at_call, owner)
            weight = float_weight(model.get_submodule(name)) if name in named else None
            if weight is not None:
                named[name].set_bits(bits)
                named[name].calibrate(weight)
    sites = activation_quantizers(model)
    for pattern, width in (activations or {}).items():
        for name in select(pattern, sites, argument="set_bits"):
            sites[name].set_bits(width)
            if sites[name].seen is not None:
                sites[name].refit()
