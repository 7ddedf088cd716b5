"""Quantized checkpoints into models that have no quantizers yet.

A quantized model's own ``load_state_dict`` takes quantized and float state dicts alike (a hook on each layer completes
float ones). `load` is for the other direction: it builds the quantizers a checkpoint was saved with.
"""

import math
import pickle
import posixpath
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.attach import attach_sites, detach, set_estimator
from lq.errors import DataError
from lq.final_widths import warn_if_unfinished
from lq.folding import fold_pair, foldable_pairs
from lq.interception import CALLS, is_weight_key
from lq.scheme import PlannedSite
from lq.sites import INPUT, OUTPUT, WEIGHT_STATE, Role, Site, is_attached, quantizers
from lq.spec import QuantSpec

M = TypeVar("M", bound=nn.Module)


def load(source: str | Path | Mapping[str, Any], model: M) -> M:
    """Load a quantized checkpoint into a float or quantized model; quantizers are built from the checkpoint.

    Args:
        source: a state dict, a checkpoint with one under "state_dict" (Lightning's), or the path of a file of either
            kind, or of a packed one (`lq.save`, ".safetensors").
        model: the model it was saved from, as the float code builds it. BatchNorms that were folded are folded here
            too.

    Returns:
        The model, quantized, in place.

    Raises:
        DataError: if there is no quantizer in the checkpoint, or one for a layer the model does not have; if a packed
            file is damaged, of a newer lq, or of another model.

    >>> import lq
    >>> saved = lq.attach(nn.Sequential(nn.Linear(4, 4)), weights=2)
    >>> loaded = load(saved.state_dict(), nn.Sequential(nn.Linear(4, 4)))
    >>> torch.equal(loaded[0].weight, saved[0].weight)
    True
    """
    if isinstance(source, (str, Path)) and Path(source).suffix == ".safetensors":
        from lq.export.packed import load as load_packed

        load_packed(source, model)
    else:
        state_dict = read_state_dict(source)
        rebuild(model, state_dict)
        model.load_state_dict(state_dict)
    warn_if_unfinished(model, f"{type(model).__name__}, loaded from a checkpoint,")
    return model


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a mapping or a file; nothing but tensors and plain values is unpickled."""
    try:
        content = source if isinstance(source, Mapping) else torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise DataError(f"{source} is no checkpoint of tensors: {error}") from error
    found = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(found, Mapping):
        raise DataError(f"expected a state dict or a checkpoint with one, got a {type(found).__name__}")
    return dict(found)


def rebuild(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Fold and attach as the checkpoint's model was; values are not loaded.

    Raises:
        DataError: if there is no quantizer in `state_dict`, or one for a layer the model does not have.
    """
    plan = planned_by(state_dict)
    if not plan:
        raise DataError("the checkpoint has no quantizers: it is a float one; use model.load_state_dict")
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for planned in plan.values():
        if planned.site.module not in names:
            raise DataError(
                f"the checkpoint quantizes a layer {planned.site.module!r} that {type(model).__name__} does not have; "
                "build the model the checkpoint was saved from"
            )
    if not is_attached(model):
        for pair in foldable_pairs(model):
            if not any(key.startswith(f"{pair.norm}.running_") for key in state_dict):
                fold_pair(model, pair)
    modules = dict(model.named_modules(remove_duplicate=False))
    plan = _once(plan, modules)
    present = _once(planned_by(model.state_dict()), modules)
    kinds = [{name: (p.owner, p.spec.per_channel) for name, p in sites.items()} for sites in (present, plan)]
    if kinds[0] == kinds[1]:
        return
    old = {quantizer.name: quantizer for quantizer in quantizers(model)}
    if old:
        detach(model)
    attach_sites(model, plan, calibrate=False)
    for quantizer in quantizers(model):
        before = old.get(quantizer.name)
        quantizer.spec = before.spec if before else None  # how it was made is not in the checkpoint
    if old:
        set_estimator(model, next(iter(old.values())).estimator)


def _once(plan: dict[str, PlannedSite], modules: Mapping[str, nn.Module]) -> dict[str, PlannedSite]:
    """The plan without the other names that a module with several is saved under."""
    owners = {planned.owner for planned in plan.values()}
    seen: set[tuple[int, str]] = set()
    kept = {}
    for name, planned in plan.items():
        place = (id(modules[planned.site.module]), planned.site.place)
        if place not in seen or name in owners:
            kept[name] = planned
        seen.add(place)
    return kept


def planned_by(state_dict: Mapping[str, Any]) -> dict[str, PlannedSite]:
    """The sites that a quantized model's state dict has quantizers for."""
    found: dict[str, PlannedSite] = {}
    shared: dict[str, tuple[Site, str]] = {}
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        site = _site(name) if last in ("bits", "_extra_state") else None
        if site is None:
            continue
        if last == "bits":
            site = replace(site, channels=value.numel())
            found[site.name] = PlannedSite(site, _spec(value, symmetric=site.role == "weight"))
        else:
            module = site.module.replace(".", "/") or "."
            path = posixpath.normpath(posixpath.join(module, bytes(value.tolist()).decode()))
            owner = _site(path.replace("/", "."))
            if owner is not None:
                shared[site.name] = (site, owner.name)
    for name, (site, owner_name) in shared.items():
        found[name] = PlannedSite(site, found[owner_name].spec, owner_name)
    return found


def _site(key: str) -> Site | None:
    """The site of the quantizer whose state is under `key`."""
    name = f".{key}"
    if name.endswith(f".{WEIGHT_STATE}"[:-1]):
        return Site(name[: -len(WEIGHT_STATE)].strip("."), "weight", "weight")
    parent, _, last = name.rpartition(".")
    if last in (INPUT, OUTPUT):
        return Site(parent.strip("."), last.removesuffix("_quantizer"), "activation")
    if parent.endswith(f".{CALLS}"):
        role: Role = "weight" if is_weight_key(last) else "activation"
        return Site(parent[: -len(CALLS)].strip("."), last, role)
    return None


def _spec(bits: Tensor, *, symmetric: bool) -> QuantSpec:
    """A spec of these widths; of widths that are being learned, of the integers above."""
    integers = [width if (width := math.ceil(b)) <= 8 else 16 for b in bits.flatten().tolist()]
    widths = integers[0] if bits.ndim == 0 else tuple(integers)
    return QuantSpec(widths, per_channel=bits.ndim > 0, symmetric=symmetric)
