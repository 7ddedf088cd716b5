"""Put quantizers on a model, and take them off again.

`attach` registers a `WeightQuantizer` as parametrization of each weight and an `ActivationQuantizer` as submodule
``input_quantizer`` or ``output_quantizer`` behind a hook; quantizers inside a module's forward are those of
`lq.interception`. The model stays what it was: same classes (``isinstance`` holds), same Parameter objects, same code.
`detach` is its exact inverse. Hooks look everything up on the module they are called with, so that copies of the model
(`copy.deepcopy`) have quantizers of their own.
"""

import posixpath
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from lq.channels import ChannelLayout
from lq.errors import StateError
from lq.estimators import Estimator
from lq.estimators import estimator as estimator_of
from lq.interception import (
    CALLS,
    SharedQuantizer,
    add_call_quantizer,
    call_quantizers,
    remove_call_quantizers,
)
from lq.patterns import select
from lq.quantizer import ActivationQuantizer, WeightQuantizer
from lq.scheme import Override, PlannedSite, Skip, Width, plan_sites
from lq.sites import (
    INPUT,
    OUTPUT,
    WEIGHT_STATE,
    Site,
    activation_quantizers,
    float_weight,
    is_attached,
    quantizers,
    require_attached,
    weight_quantizer,
)
from lq.spec import QuantSpec
from lq.stored import bake_calls, find_range, find_range_in, note_known_sources, read_from
from lq.structure import Structure

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
            layers or not, and a tensor that several read is quantized once.
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
        estimator: how gradients pass the rounding, and what of the grid is learned: one of `lq.estimators`, or its
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
        attach_sites(model, plan)
        set_estimator(model, estimator)
    except Exception:
        if is_attached(model):
            detach(model)
        raise
    return model


def attach_sites(model: nn.Module, plan: Mapping[str, PlannedSite], *, calibrate: bool = True) -> None:
    """Put quantizers at the planned sites of `model`; `calibrate` finds the ranges of its weights.

    Raises:
        StateError: if the model lacks a module of the plan.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = next((p.site.module for p in plan.values() if p.site.module not in modules), None)
    if missing is not None:
        raise StateError(
            f"the structure has a module {missing!r} that {type(model).__name__} does not have; "
            "inspect this model, or build the one that was inspected"
        )
    reference = next(iter([*model.parameters(), *model.buffers()]), None)
    device = torch.device("cpu") if reference is None else reference.device
    tied: dict[tuple[int, QuantSpec], WeightQuantizer] = {}
    placed: dict[str, ActivationQuantizer] = {}
    # Quantizers at calls come last: their hooks on the modules below go around the quantizers there.
    for name, planned in sorted(plan.items(), key=lambda item: item[1].site.at_call):
        module, site, spec = modules[planned.site.module], planned.site, planned.spec
        if site.place == "weight":
            _attach_weight(module, name, spec, tied, calibrate)
        elif site.role == "weight":
            quantizer = WeightQuantizer(spec, ChannelLayout(site.channels), name).to(device)
            read_from(quantizer, site.source and site.source.below(site.module))
            add_call_quantizer(module, site.place, quantizer.train(module.training))
        elif planned.owner is None:
            placed[name] = ActivationQuantizer(spec, name, tokens=_is_rows(module, site)).to(device)
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
    note_known_sources(model)
    if calibrate:
        for module in model.modules():
            for part in call_quantizers(module).values():
                if isinstance(part, WeightQuantizer):
                    find_range(part, module)


def slot_of(site: Site) -> str:
    """Name, below its module, of the quantizer of an activation."""
    return {"input": INPUT, "output": OUTPUT}.get(site.place, f"{CALLS}.{site.place}")


def _attach_weight(
    module: nn.Module, name: str, spec: QuantSpec, tied: dict[tuple[int, QuantSpec], WeightQuantizer], calibrate: bool
) -> None:
    """Parametrize the weight of a layer; layers that share a Parameter share its quantizer."""
    weight = float_weight(module)
    if weight is None:
        return
    quantizer = tied.get((id(weight), spec))
    if quantizer is None:
        quantizer = WeightQuantizer(spec, ChannelLayout.of(module, weight), name)
        quantizer.to(weight.device).train(module.training)
        tied[id(weight), spec] = quantizer
        if calibrate:
            quantizer.calibrate(weight)
    order = list(module._parameters)
    parametrize.register_parametrization(module, "weight", quantizer, unsafe=True)  # checks would quantize once more
    module.parametrizations.parameter_order = order  # type: ignore[union-attr]


def _place(module: nn.Module, site: Site, quantizer: nn.Module) -> None:
    """Put the quantizer of an activation where it belongs."""
    if site.place == "input":
        module.add_module(INPUT, quantizer)
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    elif site.place == "output":
        module.add_module(OUTPUT, quantizer)
        module.register_forward_hook(_quantize_output)
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
        if parametrize.is_parametrized(module, "weight") and weight_quantizer(module) is not None:
            order: list[str] = module.parametrizations.parameter_order  # type: ignore[union-attr, assignment]
            _restore_weight(module, bake)
            module._parameters = {key: module._parameters[key] for key in order}
        for name, table, hook in (
            (INPUT, module._forward_pre_hooks, _quantize_input),
            (OUTPUT, module._forward_hooks, _quantize_output),
        ):
            if not bake and name in module._modules:
                delattr(module, name)
                for key in _remove_hooks(table, hook):
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
    if not bake:
        remove_call_quantizers(model)
    for module in model.modules():
        if not {INPUT, OUTPUT, CALLS} & module._modules.keys():
            _remove_hooks(module._load_state_dict_pre_hooks, accept_float_checkpoint)
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
    """Choose how gradients pass all quantizers: an estimator of `lq.estimators`, or its name."""
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


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: quantize the first argument by the quantizer of the module that is called."""
    quantizer = getattr(module, INPUT)
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, {key: quantizer(value) if key == "input" else value for key, value in kwargs.items()}


def _quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: quantize the result by the quantizer of the module that was called."""
    return getattr(module, OUTPUT)(output)


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
    calls = {f"{CALLS}.{slot}": found for slot, found in call_quantizers(module).items()}
    for slot, found in {**{name: module._modules.get(name) for name in (INPUT, OUTPUT)}, **calls}.items():
        if found is None or any(key.startswith(f"{prefix}{slot}.") for key in state_dict):
            continue
        if isinstance(found, WeightQuantizer):
            find_range_in(found, state_dict, prefix)
        elif isinstance(found, ActivationQuantizer) and found.calibrated:
            warnings.warn(
                "a checkpoint without activation ranges was loaded into a calibrated model, whose ranges were kept; "
                "run lq.calibrate(model, batches) to fit them to the loaded weights",
                UserWarning,
                stacklevel=2,
            )
        state_dict.update(found.state_dict(prefix=f"{prefix}{slot}."))


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
