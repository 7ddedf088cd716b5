"""Where quantizers sit on modules: put there by a plan, run by hooks, taken off again.

The weight of a layer gets a `WeightQuantizer` as parametrization; its input or output an `ActivationQuantizer` as
submodule ``input_quantizer`` or ``output_quantizer`` behind a hook; what is inside a forward is
`lq.attachment.interception`'s. Hooks look everything up on the module they are called with, so that copies of the
model (`copy.deepcopy`) have quantizers of their own. A parameter that several layers or calls use alike has one
quantizer.
"""

import posixpath
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lq.attachment.interception import add_call_quantizer, call_quantizers
from lq.attachment.padded import keep_padded
from lq.attachment.running import CALLS, CallQuantizers, rounded_in_place
from lq.attachment.scheme import PlannedSite
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import INPUT, OUTPUT, WEIGHT_STATE, float_weight, weight_quantizer
from lq.attachment.stored import find_range, find_range_in, note_known_sources, read_from
from lq.errors import StateError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.log_quantizer import LogQuantizer
from lq.quantizer.spec import QuantSpec
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout
from lq.structure.places import Places
from lq.structure.site import Site

# Attribute of a copied tensor: the one that a module which works in place was given.
_CHANGED = "_lq_changed"

#: Quantizers of weights by what they quantize, so that each parameter has one for each way it is used.
_Tied = dict[tuple[Any, ...], WeightQuantizer]


def attach_sites(
    model: nn.Module,
    plan: Mapping[str, PlannedSite],
    *,
    calibrate: bool = True,
    places: Mapping[str, Places] | None = None,
) -> None:
    """Put quantizers at the planned sites of `model`.

    Args:
        model: a model without quantizers.
        plan: the sites.
        calibrate: whether to find the ranges of its weights.
        places: where in the code the calls of each module stand; found out in the first run if it is not known.

    Raises:
        StateError: if the model lacks a module of the plan, or is on the meta device.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _require_parts(model, modules, plan)
    reference = next(iter([*model.parameters(), *model.buffers()]), None)
    device = torch.device("cpu") if reference is None else reference.device
    tied: _Tied = {}
    placed: dict[str, ActivationQuantizer] = {}
    # Quantizers at calls come last: their hooks on the modules below go around the quantizers there.
    for name, planned in sorted(plan.items(), key=lambda item: item[1].site.at_call):
        module, site, spec = modules[planned.site.module], planned.site, planned.spec
        if site.place == "weight":
            _attach_weight(module, name, spec, tied, calibrate)
        elif site.role == "weight":
            quantizer = _call_weight(site, spec, module, tied).to(device)
            add_call_quantizer(module, site.place, quantizer.train(module.training))
        elif planned.owner is None:
            kind = LogQuantizer if spec.levels != "uniform" else ActivationQuantizer
            placed[name] = kind(spec, name, tokens=_is_rows(module, site)).to(device)
            placed[name].result_may_change = site.place.endswith("output")
            _place(module, site, placed[name].train(module.training))
        _complete_checkpoints(module)
    for _, planned in sorted(plan.items(), key=lambda item: item[1].site.at_call):
        if planned.owner is not None:
            module, owner = modules[planned.site.module], plan[planned.owner].site
            start, target = (site.module.replace(".", "/") or "." for site in (planned.site, owner))
            path = posixpath.normpath(
                posixpath.join(posixpath.relpath(target, start), slot_of(owner).replace(".", "/"))
            )
            shared = SharedQuantizer(placed[planned.owner], path)
            _place(module, planned.site, shared.train(module.training))
            _complete_checkpoints(module)
    _note_places(modules, places or {})
    keep_padded(model)
    note_known_sources(model)
    if calibrate:
        for module in model.modules():
            for part in call_quantizers(module).values():
                if isinstance(part, WeightQuantizer):
                    find_range(part, module)


def _require_parts(model: nn.Module, modules: Mapping[str, nn.Module], plan: Mapping[str, PlannedSite]) -> None:
    """Raise if the model lacks a module of the plan, or the values of its weights."""
    missing = next((p.site.module for p in plan.values() if p.site.module not in modules), None)
    if missing is not None:
        raise StateError(
            f"the structure has a module {missing!r} that {type(model).__name__} does not have; "
            "inspect this model, or build the one that was inspected"
        )
    unmade = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if unmade is not None:
        raise StateError(
            f"{unmade} is on the meta device and has no values to find ranges of; give the model its weights first "
            "(model.to_empty(device=...) and load_state_dict)"
        )


def _note_places(modules: Mapping[str, nn.Module], places: Mapping[str, Places]) -> None:
    for name, known in places.items():
        calls = modules[name]._modules.get(CALLS) if name in modules else None
        if isinstance(calls, CallQuantizers):
            calls.places = known


def slot_of(site: Site) -> str:
    """Name, below its module, of the quantizer of an activation."""
    return {"input": INPUT, "output": OUTPUT}.get(site.place, f"{CALLS}.{site.place}")


def _attach_weight(module: nn.Module, name: str, spec: QuantSpec, tied: _Tied, calibrate: bool) -> None:
    """Parametrize the weight of a layer; layers that share a Parameter share its quantizer."""
    weight = float_weight(module)
    if weight is None:
        return
    layout = ChannelLayout.of(module, weight)
    quantizer = tied.get((id(weight), layout, spec))
    if quantizer is None:
        quantizer = WeightQuantizer(spec, layout, name)
        quantizer.to(weight.device).train(module.training)
        tied[id(weight), layout, spec] = quantizer
        if calibrate:
            quantizer.calibrate(weight)
    order = list(module._parameters)
    parametrize.register_parametrization(module, "weight", quantizer, unsafe=True)  # checks would quantize once more
    module.parametrizations.parameter_order = order  # type: ignore[union-attr]


def _call_weight(site: Site, spec: QuantSpec, module: nn.Module, tied: _Tied) -> WeightQuantizer:
    """The quantizer of a weight at a call; calls that use a parameter alike share it."""
    source = site.source and site.source.below(site.module)
    parameter = None if source is None else source.within(module)
    key = (source, id(parameter), spec)
    if parameter is not None and key in tied:
        return tied[key]
    quantizer = WeightQuantizer(spec, ChannelLayout(site.channels), site.name)
    read_from(quantizer, source)
    tied[key] = quantizer
    return quantizer


def _place(module: nn.Module, site: Site, quantizer: nn.Module) -> None:
    """Put the quantizer of an activation where it belongs."""
    if site.place == "input":
        module.add_module(INPUT, quantizer)
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    elif site.place == "output":
        module.add_module(OUTPUT, quantizer)
        module.register_forward_hook(_quantize_output)
        if getattr(module, "inplace", False) is True:
            module.register_forward_pre_hook(_copy_what_is_changed)
    else:
        add_call_quantizer(module, site.place, quantizer)


def _is_rows(module: nn.Module, site: Site) -> bool:
    """Whether the tensor holds vectors along its last dimension (keys come transposed or not)."""
    if site.place == "input":
        return isinstance(module, nn.Linear)
    return site.at_call and not site.place.startswith("conv") and not site.place.endswith("_right")


def _complete_checkpoints(module: nn.Module) -> None:
    hooks = module._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is accept_float_checkpoint for hook in hooks):
        module.register_load_state_dict_pre_hook(accept_float_checkpoint)
        module.register_state_dict_pre_hook(_take_over_writes)


def remove_from_weight(module: nn.Module, bake: bool) -> None:
    """Take the quantizer off the weight of a layer, if it has one; `bake` leaves the quantized values in the weight."""
    if parametrize.is_parametrized(module, "weight") and weight_quantizer(module) is not None:
        float_weight(module)  # takes over what was written
        order: list[str] = module.parametrizations.parameter_order  # type: ignore[union-attr, assignment]
        _restore_weight(module, bake)
        module._parameters = {key: module._parameters[key] for key in order}


def remove_from_tensors(module: nn.Module) -> None:
    """Take the quantizers off the input and the output of a module."""
    for name, table, hook in (
        (INPUT, module._forward_pre_hooks, _quantize_input),
        (OUTPUT, module._forward_hooks, _quantize_output),
    ):
        if name in module._modules:
            delattr(module, name)
            for key in _remove_hooks(table, hook):
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    _remove_hooks(module._forward_pre_hooks, _copy_what_is_changed)


def remove_checkpoint_hooks(module: nn.Module) -> None:
    """Have a module save and load as it did, if nothing of quantizers is left on it."""
    if not {INPUT, OUTPUT, CALLS} & module._modules.keys():
        _remove_hooks(module._load_state_dict_pre_hooks, accept_float_checkpoint)
        _remove_hooks(module._state_dict_pre_hooks, _take_over_writes)


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: quantize the first argument by the quantizer of the module that is called."""
    quantizer = getattr(module, INPUT)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {key: quantizer(value) if key == "input" else value for key, value in kwargs.items()}


def _quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: quantize the result by the quantizer of the module that was called."""
    quantizer = getattr(module, OUTPUT)
    in_place = isinstance(output, Tensor) and any(output is given for given in args[:1])
    if not in_place or torch.compiler.is_compiling():
        return quantizer(output)
    changed = getattr(output, _CHANGED, output)  # by a module that works in place
    return rounded_in_place(quantizer, changed, lambda _: output)


def _copy_what_is_changed(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Forward pre-hook of modules that work in place, which may need their result, not the rounded one, in backward."""
    if not args or not isinstance(args[0], Tensor) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    copied = args[0].clone()
    setattr(copied, _CHANGED, args[0])
    return (copied, *args[1:])


def _take_over_writes(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict hook: what code has written into the quantized weight is saved."""
    float_weight(module)


def accept_float_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict hook: complete what a float checkpoint lacks of a quantized layer.

    The weight goes to where the quantizer reads it, and its range is found anew. Activation ranges stay as they are.
    """
    quantizer = weight_quantizer(module)
    if quantizer is not None and f"{prefix}weight" in state_dict and f"{prefix}{WEIGHT_STATE}bits" not in state_dict:
        weight = state_dict.pop(f"{prefix}weight")
        state_dict[f"{prefix}parametrizations.weight.original"] = weight
        if weight.shape == module.parametrizations.weight.original.shape:  # type: ignore[union-attr]  # else torch reports the mismatch
            quantizer.calibrate(weight.to(quantizer.bits.device))
        state_dict.update(quantizer.state_dict(prefix=f"{prefix}{WEIGHT_STATE}"))
    calls = {f"{CALLS}.{slot}": at_tensor for slot, at_tensor in call_quantizers(module).items()}
    for slot, at_tensor in {**{name: module._modules.get(name) for name in (INPUT, OUTPUT)}, **calls}.items():
        if at_tensor is None or any(key.startswith(f"{prefix}{slot}.") for key in state_dict):
            continue
        if isinstance(at_tensor, WeightQuantizer):
            find_range_in(at_tensor, state_dict, prefix)
        elif isinstance(at_tensor, ActivationQuantizer) and at_tensor.calibrated:
            warnings.warn(
                "a checkpoint without activation ranges was loaded into a calibrated model, whose ranges were kept; "
                "run lq.calibrate(model, batches) to fit them to the loaded weights",
                UserWarning,
                stacklevel=2,
            )
        state_dict.update(at_tensor.state_dict(prefix=f"{prefix}{slot}."))


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
