"""Quantized checkpoints into models that have no quantizers yet.

A quantized model's own ``load_state_dict`` takes quantized and float state dicts alike (a hook on each layer completes
float ones). `load` is for the other direction: it builds the quantizers a checkpoint was saved with.
"""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from lq.attachment.attach import detach, set_estimator
from lq.attachment.foldable import foldable_pairs
from lq.attachment.folded import folded_norms, folded_pairs
from lq.attachment.folding import fold_pair, unfold_for
from lq.attachment.pairs import is_norm
from lq.attachment.placement import attach_sites
from lq.attachment.preparation.stored import is_marker, made_biases, match
from lq.attachment.relu import MARK, put_relus_of
from lq.attachment.saved_plan import kind_of, planned_by, site_of
from lq.attachment.scheme import PlannedSite
from lq.attachment.sites import float_weight, is_attached, quantizers
from lq.errors import DataError
from lq.files import named, read_checkpoint
from lq.quantizer.final_widths import FINAL
from lq.quantizer.log_quantizer import LOG_STATE
from lq.quantizer.quantizer import Quantizer
from lq.structure.channels import ChannelLayout
from lq.structure.site import Site

M = TypeVar("M", bound=nn.Module)

# Where a quantized layer has its float weight.
_ORIGINAL = "parametrizations.weight.original"

# Steps are float32.
_LARGEST_LOG2_STEP = 127.0

# The state of a quantizer.
_STATE = ("log2_step", "zero_point", "bits")


def load_state(state_dict: Mapping[str, Any], source: object, model: nn.Module, part: str | None) -> None:
    """Load a state dict from a source, or the part of it that is of `model`."""
    with named(source) if isinstance(source, (str, Path)) else nullcontext():
        name = part_of(state_dict, model) if part is None else part
        state_dict = _below(name, state_dict)
        require_fit(model, state_dict, f"the part {name!r} of the checkpoint" if name else "the checkpoint")
        rebuild(model, state_dict)
    model.load_state_dict(state_dict)


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a mapping or a file; nothing but tensors and plain values is unpickled.

    Raises:
        DataError: if there is none.
    """
    is_file = isinstance(source, (str, Path))
    content = read_checkpoint(source) if isinstance(source, (str, Path)) else source
    with named(str(source)) if is_file else nullcontext():
        state_dict = content.get("state_dict", content) if isinstance(content, Mapping) else content
        if not isinstance(state_dict, Mapping):
            raise DataError(f"expected a state dict or a checkpoint with one, got a {type(state_dict).__name__}")
        strange = next((key for key in state_dict if not isinstance(key, str)), None)
        if strange is not None:
            raise DataError(f"expected a state dict with names of tensors, got one with the key {strange!r:.80}")
    return dict(state_dict)


def part_of(state_dict: Mapping[str, Any], model: nn.Module) -> str:
    """Name of the part of a checkpoint that is of `model`, such as "net"; "" for the whole.

    Raises:
        DataError: if several parts fit.
    """
    anchor = next((key for key in _plain(model.state_dict()) if key.endswith("weight")), None)
    keys = [key for key in _plain(state_dict) if anchor is not None and f".{key}".endswith(f".{anchor}")]
    names = [key.removesuffix(str(anchor)).removesuffix(".") for key in keys]
    if len(names) > 1 and "" not in names:
        names = [name for name in names if not _lacking(model, _below(name, state_dict))]
    if len(names) > 1 and "" not in names:
        listed = " and ".join(map(repr, names))
        raise DataError(f"several parts of the checkpoint fit {type(model).__name__}: {listed}; choose one by part=")
    return names[0] if len(names) == 1 else ""


def _below(name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a part, without its name."""
    prefix = f"{name}." if name else ""
    entries = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not entries and state_dict:
        parts = sorted({key.partition(".")[0] for key in state_dict})
        raise DataError(f"the checkpoint has no part {name!r}; it has {', '.join(parts[:8])}")
    return entries


def require_fit(model: nn.Module, state_dict: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Raise if a quantized model's state dict is not of this model; the model is not touched.

    Args:
        model: the model, float or quantized.
        state_dict: tensors by key, or their shapes.
        source: what they are from, for the message.

    Raises:
        DataError: if there is no quantizer, if one is for a layer the model does not have, or lacks a part of its
            state; if tensors are missing, too many, or of other shapes or kinds.
    """
    states = {key.rpartition(".")[0] for key in state_dict if key.rpartition(".")[2] in (*_STATE, "_extra_state")}
    sites = {name: site for name in sorted(states) if (site := site_of(name)) is not None}
    if not sites:
        raise DataError(f"{source} has no quantizers: it is a float one; use model.load_state_dict")
    if lacks := _lacking(model, state_dict):
        raise DataError(
            f"{source} is not of this {type(model).__name__}: {'; '.join(lacks)}; "
            "build the model that was saved, before quantization"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    _require_layers(sites.values(), model, source)
    for name, site in sites.items():
        if f"{name}._extra_state" in state_dict:  # another's, which is shared
            continue
        shapes = {part: _shape(state_dict[f"{name}.{part}"]) for part in _STATE if f"{name}.{part}" in state_dict}
        if len(shapes) < len(_STATE) or len(set(shapes.values())) > 1:
            raise DataError(f"the quantizer {name!r} in {source} should have {', '.join(_STATE)} of one shape")
        kinds = {kind_of(state_dict[f"{name}.{part}"]) for part in _STATE} - {None, "floats"}
        if kinds:
            raise DataError(f"the quantizer {name!r} in {source} should have floats, it has {kinds.pop()}")
        _require_grid(name, state_dict, source)
        shape, weight = shapes["bits"], float_weight(modules[site.module]) if site.place == "weight" else None
        if site.place == "weight" and (weight is None or f"{name.removesuffix('0')}original" not in state_dict):
            raise DataError(f"{source} has the quantizer {name!r}, and no weight for it")
        allowed = [()] if weight is None else [(), (ChannelLayout.of(modules[site.module], weight).channels,)]
        if shape not in allowed and not (site.at_call and site.role == "weight"):
            raise DataError(f"the quantizer {name!r} in {source} has the shape {shape}, expected {allowed[-1]}")


def _require_grid(name: str, state_dict: Mapping[str, Any], source: str) -> None:
    """Raise if a quantizer's steps or zero points are no numbers; steps are NaN before calibration."""
    log2_step, zero_point = (state_dict[f"{name}.{part}"] for part in ("log2_step", "zero_point"))
    if not isinstance(log2_step, Tensor) or not isinstance(zero_point, Tensor):  # only the shapes are known
        return
    if bool((log2_step > _LARGEST_LOG2_STEP).any()) or not bool(zero_point.isfinite().all()):
        raise DataError(f"the quantizer {name!r} in {source} has steps or zero points that are no finite numbers")


def _lacking(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """What a state dict does not have of a model, has besides, or has in other shapes or kinds."""
    ours, theirs = _plain(model.state_dict()), _plain(state_dict)
    known = {key for key, part in model.named_modules(remove_duplicate=False) if isinstance(part, Quantizer)}
    ours = {key: value for key, value in ours.items() if key.rpartition(".")[0] not in known}
    # BatchNorms that one of the two has folded: `rebuild` folds them too, or puts them back.
    in_theirs = {key.rpartition(".")[0] for key in theirs}
    gone = [pair for pair in foldable_pairs(model) if pair.norm not in in_theirs]
    back = {pair: norm for pair, norm in folded_pairs(model).items() if pair.norm in in_theirs}
    norms, biases = {pair.norm for pair in gone}, {f"{pair.conv}.bias" for pair in [*gone, *back]}
    biases |= made_biases(state_dict) | made_biases(model.state_dict())  # `rebuild` makes them, or takes them off
    ours = {key: value for key, value in ours.items() if key.rpartition(".")[0] not in norms}
    ours |= {f"{pair.norm}.{key}": value for pair, norm in back.items() for key, value in norm.state_dict().items()}
    missing, unknown = (sorted(found - biases) for found in (ours.keys() - theirs.keys(), theirs.keys() - ours.keys()))
    both = sorted(key for key in ours.keys() & theirs.keys() if not key.endswith("_extra_state"))
    lacks = [f"it has no {', '.join(missing[:3])}"] if missing else []
    lacks += [f"the model has no {', '.join(unknown[:3])}"] if unknown else []
    shapes = [key for key in both if _shape(ours[key]) != _shape(theirs[key])]
    lacks += [f"{key} is {_shape(theirs[key])} there and {_shape(ours[key])} here" for key in shapes[:3]]
    kinds = [key for key in both if key not in shapes and kind_of(theirs[key]) not in (None, kind_of(ours[key]))]
    return lacks + [f"{key} is {kind_of(theirs[key])} there and {kind_of(ours[key])} here" for key in kinds[:3]]


def _plain(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by the names that a float model has for them, without those of quantizers."""
    entries = {}
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        if last in (*_STATE, *LOG_STATE, FINAL, "_extra_state") and site_of(name) is not None:
            continue
        if is_marker(key) or last == MARK:
            continue
        if f".{key}".endswith(f".{_ORIGINAL}") and f"{key.removesuffix('original')}0.bits" in state_dict:
            key = f"{key.removesuffix(_ORIGINAL)}weight"  # noqa: PLW2901
        entries[key] = value
    return entries


def _shape(value: Any) -> tuple[int, ...] | str:
    """The shape of a tensor, or what else it is; shapes stand for themselves."""
    if isinstance(value, tuple):
        return value
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def rebuild(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Fold and attach as the checkpoint's model was; values are not loaded.

    Raises:
        DataError: if there is no quantizer in `state_dict`, or one for a layer the model does not have.
    """
    plan = planned_by(state_dict)
    _require_layers([planned.site for planned in plan.values()], model, "the checkpoint")
    put_relus_of(model, state_dict)
    old = {quantizer.name: quantizer for quantizer in quantizers(model)}
    if folds_otherwise(model, state_dict):
        if is_attached(model):
            detach(model)
        unfold_for(model, state_dict)
        for pair in foldable_pairs(model):
            if not _has_statistics(state_dict, pair.norm):
                fold_pair(model, pair)
    match(model, state_dict)
    modules = dict(model.named_modules(remove_duplicate=False))
    plan = _once(plan, modules)
    present = _once(planned_by(model.state_dict()), modules)
    kinds = [{n: (p.owner, p.spec.per_channel, p.spec.levels) for n, p in sites.items()} for sites in (present, plan)]
    if kinds[0] == kinds[1]:
        return
    if is_attached(model):
        detach(model)
    attach_sites(model, plan, calibrate=False)
    if old:
        first = min(old.values(), key=lambda quantizer: not quantizer.is_weight)  # that of activations follows from it
        set_estimator(model, first.estimator)
    for quantizer in quantizers(model):
        before = old.get(quantizer.name)
        quantizer.spec = before.spec if before else None  # how it was made is not in the checkpoint
        if before:
            quantizer.set_estimator(before.estimator)


def folds_otherwise(model: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has folded BatchNorms that `model` has, or has some that `model` has folded."""
    lacks = any(is_norm(m) and not _has_statistics(state_dict, name) for name, m in model.named_modules())
    return lacks or any(_has_statistics(state_dict, name) for name in folded_norms(model))


def _has_statistics(state_dict: Mapping[str, Any], norm: str) -> bool:
    return f"{norm}.running_mean" in state_dict


def _once(plan: dict[str, PlannedSite], modules: Mapping[str, nn.Module]) -> dict[str, PlannedSite]:
    """The plan without the other names that a module with several is saved under."""
    owners = {planned.owner for planned in plan.values()}
    places: set[tuple[int, str]] = set()
    sites = {}
    for name, planned in plan.items():
        place = (id(modules[planned.site.module]), planned.site.place)
        if place not in places or name in owners:
            sites[name] = planned
        places.add(place)
    return sites


def _require_layers(sites: Collection[Site], model: nn.Module, source: str) -> None:
    """Raise if there are no sites, or one in a layer that the model does not have."""
    if not sites:
        raise DataError(f"{source} has no quantizers: it is a float one; use model.load_state_dict")
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for site in sites:
        if site.module not in names:
            raise DataError(
                f"{source} quantizes a layer {site.module!r} that {type(model).__name__} does not have; "
                "build the model the checkpoint was saved from"
            )
