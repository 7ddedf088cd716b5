"""The sites that a state dict has quantizers for, told by its keys and by the widths that it says."""

import math
import posixpath
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lq.attachment.running import CALLS
from lq.attachment.scheme import PlannedSite
from lq.attachment.sites import INPUT, OUTPUT, WEIGHT_STATE
from lq.errors import DataError
from lq.quantizer.log_quantizer import levels_in_state
from lq.quantizer.spec import QuantSpec
from lq.structure.site import Role, Site, is_weight_key


def planned_by(state_dict: Mapping[str, Any]) -> dict[str, PlannedSite]:
    """The sites that a quantized model's state dict has quantizers for."""
    plan: dict[str, PlannedSite] = {}
    shared: dict[str, tuple[Site, str]] = {}
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        site = site_of(name) if last in ("bits", "_extra_state") else None
        if site is None:
            continue
        if last == "bits":
            widths = _widths(key, value, per_channel=site.role == "weight")
            site = replace(site, channels=len(widths) if isinstance(widths, tuple) else 1)
            spec = QuantSpec(
                widths,
                per_channel=isinstance(widths, tuple),
                symmetric=site.role == "weight",
                levels="uniform" if isinstance(widths, tuple) else levels_in_state(state_dict, name),
            )
            plan[site.name] = PlannedSite(site, spec)
        else:
            module = site.module.replace(".", "/") or "."
            path = posixpath.normpath(posixpath.join(module, _text(key, value)))
            owner = site_of(path.replace("/", "."))
            if owner is not None:
                shared[site.name] = (site, owner.name)
    for name, (site, owner_name) in shared.items():
        if owner_name not in plan:
            raise DataError(f"the checkpoint has {name!r} share the quantizer {owner_name!r}, which is not there")
        plan[name] = PlannedSite(site, plan[owner_name].spec, owner_name)
    return plan


def site_of(key: str) -> Site | None:
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


def _widths(key: str, bits: Any, *, per_channel: bool) -> int | tuple[int, ...]:
    """The widths that a quantizer's state says; of widths that are being learned, the integers above."""
    if not isinstance(bits, Tensor) or not bits.is_floating_point() or bits.layout != torch.strided or bits.is_meta:
        raise DataError(f"{key} should be a tensor of widths, it is {kind_of(bits) or bits!r}")
    values = bits.flatten().tolist()
    if bits.ndim > per_channel or not values or not all(0 <= width <= 16 for width in values):
        expected = "one width for each channel" if per_channel else "one width"
        raise DataError(f"{key} should be {expected}, from 0 to 8 or 16 bits; it has the shape {tuple(bits.shape)}")
    integers = [width if (width := math.ceil(b)) <= 8 else 16 for b in values]
    return integers[0] if bits.ndim == 0 else tuple(integers)


def _text(key: str, state: Any) -> str:
    """The text in the extra state of a quantizer that is shared."""
    try:
        if state.dtype == torch.uint8 and state.ndim == 1 and state.numel() < 1 << 16:
            return bytes(state.tolist()).decode()
    except (AttributeError, UnicodeDecodeError, RuntimeError):
        pass
    raise DataError(f"{key} should hold the name of the quantizer that is shared, as bytes")


def kind_of(value: Any) -> str | None:
    """What kind of tensor it is, where another could not be written into it; None: only the shape is known."""
    if not isinstance(value, Tensor):
        return None if isinstance(value, tuple) else type(value).__name__
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "a tensor without plain values"
    if value.is_complex():
        return "complex"
    return "floats" if value.is_floating_point() else "integers"
