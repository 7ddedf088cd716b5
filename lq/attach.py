"""Put quantizers on a model, and take them off again.

`attach` registers a `WeightQuantizer` as parametrization of each weight and an `ActivationQuantizer` as submodule
``input_quantizer`` behind a forward pre-hook. The model stays what it was: same classes (``isinstance`` holds), same
Parameter objects, same forward. `detach` is its exact inverse. Hooks look everything up on the module they are called
with, so that copies of the model (`copy.deepcopy`) have quantizers of their own.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from lq.channels import ChannelLayout
from lq.errors import StateError
from lq.patterns import select
from lq.quantizer import ActivationQuantizer, Estimator, WeightQuantizer
from lq.scheme import LayerPlan, Override, Width, plan_layers
from lq.sites import (
    INPUT,
    WEIGHT_STATE,
    float_weight,
    input_quantizer,
    is_attached,
    quantized_layers,
    quantizers,
    require_attached,
    weight_quantizer,
)

M = TypeVar("M", bound=nn.Module)


def attach(
    model: M,
    weights: Width = 4,
    activations: Width = None,
    *,
    first_last: int | None = 8,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    overrides: Mapping[str, Override] | None = None,
    estimator: Estimator = "ste",
) -> M:
    """Quantize the weights, and on request the inputs, of the layers of `model`, in place.

    Weight ranges are found at once; activations need `lq.calibrate` before the first forward.

    Args:
        model: any module. Conv1d/2d/3d, transposed convolutions, Linear and Embedding layers are quantized.
        weights: width in bits (0..8, 16), a `QuantSpec`, or None to leave weights in float.
        activations: the same for the input of each quantized layer.
        first_last: least width of the first and last layers' weights and of the last layer's input; None: no exception.
            The input of the first layer stays float.
        include: name patterns (``*``, ``?``; a module's name covers what is inside) of the only layers to quantize.
            Layers of other kinds that have a ``weight`` of two or more dimensions can be named too.
        exclude: name patterns of layers to leave in float.
        overrides: other widths by name pattern, such as ``{"layer4": {"weights": 2}}``; the last match wins.
        estimator: "ste" keeps the steps as calibrated, "lsq" makes them learnable.

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
    plan = plan_layers(
        model,
        weights,
        activations,
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
        for name, layer in plan.items():
            attach_layer(model.get_submodule(name), name, layer)
        set_estimator(model, estimator)
    except Exception:
        if is_attached(model):
            detach(model)
        raise
    return model


def attach_layer(module: nn.Module, name: str, plan: LayerPlan, *, calibrate: bool = True) -> None:
    """Put the planned quantizers on one layer; `calibrate` finds the range of its weight."""
    weight = float_weight(module)
    if plan.weight is not None and weight is not None:
        quantizer = WeightQuantizer(plan.weight, ChannelLayout.of(module, weight), _join(name, "weight"))
        quantizer.to(weight.device).train(module.training)
        if calibrate:
            quantizer.calibrate(weight)
        order = list(module._parameters)
        parametrize.register_parametrization(
            module, "weight", quantizer, unsafe=True
        )  # checks would quantize once more
        module.parametrizations.parameter_order = order  # type: ignore[union-attr]
    if plan.input is not None:
        site = ActivationQuantizer(plan.input, _join(name, "input"), tokens=isinstance(module, nn.Linear))
        if weight is not None:
            site.to(weight.device)
        module.add_module(INPUT, site.train(module.training))
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    module.register_load_state_dict_pre_hook(accept_float_checkpoint)


def detach(model: M, bake: bool = False) -> M:
    """Take the quantizers off `model`, in place.

    Args:
        model: a model with quantizers.
        bake: False gives back the float weights, bit for bit, and removes every quantizer. True leaves the quantized
            values in the weights and keeps the activations' quantizers, which no weight can stand for: the forward
            stays the quantized one, bit for bit. A second ``detach(model)`` removes those too.

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
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight") and weight_quantizer(module) is not None:
            order: list[str] = module.parametrizations.parameter_order  # type: ignore[union-attr, assignment]
            _restore_weight(module, bake)
            module._parameters = {key: module._parameters[key] for key in order}
        if not bake and input_quantizer(module) is not None:
            delattr(module, INPUT)
            for key in _remove_hooks(module._forward_pre_hooks, _quantize_input):
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if input_quantizer(module) is None:
            _remove_hooks(module._load_state_dict_pre_hooks, accept_float_checkpoint)
    return model


def attached_plan(model: nn.Module) -> dict[str, LayerPlan] | None:
    """What `attach` was asked for, by layer; None if the quantizers were built from a checkpoint."""
    plan = {}
    for name, module in quantized_layers(model):
        weight, site = weight_quantizer(module), input_quantizer(module)
        if any(quantizer is not None and quantizer.spec is None for quantizer in (weight, site)):
            return None
        plan[name] = LayerPlan(weight.spec if weight else None, site.spec if site else None)
    return plan


def set_estimator(model: nn.Module, estimator: Estimator) -> None:
    """Choose the gradient of every quantizer: "ste" or "lsq"."""
    require_attached(model, "lq.set_estimator")
    for quantizer in quantizers(model):
        quantizer.set_estimator(estimator)


def set_bits(model: nn.Module, weights: Mapping[str, int | Sequence[int]]) -> None:
    """Change the weight widths of layers and find the ranges of the new widths.

    Args:
        model: a model with quantizers.
        weights: width, or one width per output channel (0 prunes it), by name pattern.

    Raises:
        PatternError: for a pattern that matches no layer with a quantized weight.
        SpecError: for a width that does not exist, or a wrong number of widths.

    >>> model = attach(nn.Sequential(nn.Linear(4, 3)), first_last=None)
    >>> set_bits(model, {"0": [4, 2, 0]})
    >>> model[0].weight[2].abs().max().item()
    0.0
    """
    require_attached(model, "lq.set_bits")
    named = {name: found for name, module in model.named_modules() if (found := weight_quantizer(module)) is not None}
    for pattern, widths in weights.items():
        for name in select(pattern, named, argument="set_bits"):
            weight = float_weight(model.get_submodule(name))
            named[name].set_bits(widths if isinstance(widths, int) else tuple(widths))
            if weight is not None:
                named[name].calibrate(weight)


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: quantize the first argument by the quantizer of the module that is called."""
    quantizer = getattr(module, INPUT)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {key: quantizer(value) if key == "input" else value for key, value in kwargs.items()}


def accept_float_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict hook: complete what a float checkpoint lacks of a quantized layer.

    The weight goes to where the quantizer reads it, and its range is found anew. Activation ranges stay as they are.
    """
    quantizer, site = weight_quantizer(module), input_quantizer(module)
    if quantizer is not None and f"{prefix}weight" in state_dict and f"{prefix}{WEIGHT_STATE}bits" not in state_dict:
        weight = state_dict.pop(f"{prefix}weight")
        state_dict[f"{prefix}parametrizations.weight.original"] = weight
        if weight.shape == module.parametrizations.weight.original.shape:  # type: ignore[union-attr]  # else torch reports the mismatch
            quantizer.calibrate(weight.to(quantizer.bits.device))
        state_dict.update(quantizer.state_dict(prefix=f"{prefix}{WEIGHT_STATE}"))
    if site is not None and f"{prefix}{INPUT}.bits" not in state_dict:
        if site.calibrated:
            warnings.warn(
                "a checkpoint without activation ranges was loaded into a calibrated model, whose ranges were kept; "
                "run lq.calibrate(model, batches) to fit them to the loaded weights",
                UserWarning,
                stacklevel=2,
            )
        state_dict.update(site.state_dict(prefix=f"{prefix}{INPUT}."))


def _restore_weight(module: nn.Module, bake: bool) -> None:
    """Remove the parametrization of the weight from this module, and from no copy of it.

    Copies share the class that torch made for the parametrized module, and removal deletes its property: a class of its
    own keeps that from the copies.
    """
    shared = type(module)
    body = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)
    with torch.no_grad():
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=bake)


def _remove_hooks(hooks: dict[int, Any], function: Any) -> list[int]:
    """Drop `function` from a module's hook table, wrapped or not; return the keys it had."""
    keys = [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is function]
    for key in keys:
        del hooks[key]
    return keys


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}".lstrip(".")
