"""Which tensors of a model get which spec: layer kinds, name patterns, first and last layers.

"First and last" follows BRECQ and QDrop: the first layer's weight, the last layer's weight and the last layer's input
have at least 8 bits; the network's input is not quantized (an image has 256 levels already). A timm model says which
layers these are; for others they are the first and last in the order of registration. Given a structure, the last
layer's input is also the last tensor on the skip path, which is only pooled or normalized on its way there. Layers that
the structure says nothing of, because the dry run did not reach them, are told by their class (`lq.attachment.unseen`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from torch import nn

from lq.attachment.sites import float_weight, layers
from lq.attachment.unseen import unseen_layers
from lq.errors import SpecError, StateError
from lq.quantizer.spec import QuantSpec, activation_spec, check_bits, weight_spec
from lq.structure.channels import ChannelLayout
from lq.structure.patterns import matches, only_matching, select
from lq.structure.site import Site
from lq.structure.structure import Structure

#: Layer kinds whose weight is quantized without being named.
KINDS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
)

#: A width in bits, a full spec, or None for float.
Width = int | QuantSpec | None

#: Whether residual streams are quantized; "auto": those that no layer norm reads.
Skip = bool | Literal["auto"]


class Override(TypedDict, total=False):
    """Other widths for the layers that a pattern matches."""

    weights: Width
    activations: Width


@dataclass(frozen=True)
class PlannedSite:
    """A site, the spec of its quantizer, and the name of the site whose quantizer it uses instead, if there is one."""

    site: Site
    spec: QuantSpec
    owner: str | None = None


def plan_sites(
    model: nn.Module,
    weights: Width,
    activations: Width,
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
) -> dict[str, PlannedSite]:
    """The sites to quantize, by name, in order; see `lq.attach` for the arguments."""
    weight = None if weights is None else weight_spec(weights, symmetric)
    activation = None if activations is None else activation_spec(activations)
    if weight is None and activation is None and not overrides:
        raise SpecError("weights=None and activations=None leave nothing to quantize; give at least one a width")
    if first_last is not None:
        check_bits(first_last)
    if skip not in (True, False, "auto"):
        raise SpecError(f"skip={skip!r} is unknown; use True, False or 'auto'")
    if structure is None and (skip or share_concats or integer):
        given = f"skip={skip!r}" if skip else "share_concats=True" if share_concats else "integer=True"
        raise StateError(f"{given} needs to know how the tensors flow: pass structure=lq.inspect(model, example)")
    sites, edges = _sites(model, structure, include, overrides)
    last = set() if structure is None else set(structure.last)
    chosen = {site.layer for site in sites}
    known = dict.fromkeys(site.layer for site in sites)
    if structure is not None:  # a pattern may also name what stays float anyway
        known.update(dict.fromkeys([o.name for o in structure.operations] + [name for name, _ in layers(model)]))
        if include is not None:
            chosen &= select(include, known, argument="include")
    if exclude is not None:
        chosen -= select(exclude, known, argument="exclude")
    wanted: dict[str, QuantSpec | None] = {}
    for site in sites:
        spec = None
        if site.layer in chosen:
            spec = weight if site.role == "weight" else _activation_of(site, activation, skip, integer)
        at_edge = site.layer in last or (site.layer in edges and site.role not in ("skip", "result"))
        at_edge = at_edge and (site.layer in last or not _multiplies_states(site))
        if spec is not None and at_edge and first_last is not None:
            spec = spec.at_least(first_last)
        wanted[site.name] = spec
    for pattern, override in (overrides or {}).items():
        _apply_override(sites, wanted, chosen, pattern, override, symmetric)
    planned = {site.name: (site, spec) for site in sites if (spec := wanted[site.name]) is not None}
    _use_one_spec_for_each_weight(model, planned)
    covered = {
        name
        for name, (site, spec) in planned.items()
        if site.covered_by and all(_covers(planned, other, spec) for other in site.covered_by)
    }
    floats = {site.source.parameter for site in sites if site.source and site.name not in planned}
    chosen_sites = {n: (_in_company(s, floats), spec) for n, (s, spec) in planned.items() if n not in covered}
    return _with_owners(chosen_sites, share_concats)


def _use_one_spec_for_each_weight(model: nn.Module, planned: dict[str, tuple[Site, QuantSpec]]) -> None:
    """Give sites that quantize one parameter, such as tied embeddings, the widest of their specs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[tuple[object, ...], list[str]] = {}
    for name, (site, _) in planned.items():
        module = modules.get(site.module)
        if site.role != "weight" or module is None:
            continue
        if site.place == "weight" and (weight := float_weight(module)) is not None:
            uses.setdefault((id(weight), ChannelLayout.of(module, weight)), []).append(name)
        elif site.source is not None and (found := site.source.below(site.module).within(module)) is not None:
            part = replace(site.source, parameter="", alone=True)
            uses.setdefault((id(found), part), []).append(name)
    for names in uses.values():
        widest = max((planned[name][1] for name in names), key=lambda spec: max(spec.widths))
        planned.update({name: (planned[name][0], widest) for name in names})


def _in_company(site: Site, floats: set[str]) -> Site:
    """The site; its source is not alone if a call that stays float reads the parameter, too."""
    if site.source is None or site.source.parameter not in floats:
        return site
    return replace(site, source=replace(site.source, alone=False))


def _covers(planned: Mapping[str, tuple[Site, QuantSpec]], name: str, spec: QuantSpec) -> bool:
    """Whether there is a quantizer of that name, of the levels that `spec` asks for."""
    return name in planned and planned[name][1].bits == spec.bits


def _multiplies_states(site: Site) -> bool:
    """Whether it is a weight of a recurrent module that multiplies its states, not what it is called with."""
    name = site.place if site.source is None else site.source.parameter
    return site.role == "weight" and re.search(r"weight_(h[hr]|ih_l[1-9])", name) is not None


def _quantizes(skip: Skip, site: Site) -> bool:
    return site.role == "skip" and (skip is True or (skip == "auto" and not site.normalized))


def _activation_of(site: Site, spec: QuantSpec | None, skip: Skip, integer: bool) -> QuantSpec | None:
    """The spec of a tensor that is no weight, before exceptions; `spec` is the one of activations."""
    if (site.role == "activation" or _quantizes(skip, site)) and not site.network_input:
        return spec
    return spec.at_least(8) if spec is not None and integer and not site.normalized else None


def layer_sites(model: nn.Module, include: Sequence[str] | str | None) -> tuple[tuple[Site, ...], set[str]]:
    """Sites of layers told by their class or named by `include`; and the names of the first and last layers."""
    named = dict(layers(model))
    kinds = [name for name, module in named.items() if isinstance(module, KINDS)]
    chosen = set(kinds) if include is None else select(include, named, argument="include")
    first, last = first_and_last(model, kinds)
    found = [site for name, module in named.items() if name in chosen for site in _sites_of(name, module, first)]
    return tuple(found), first | last


def _sites(
    model: nn.Module,
    structure: Structure | None,
    include: Sequence[str] | str | None,
    overrides: Mapping[str, Override] | None,
) -> tuple[tuple[Site, ...], set[str]]:
    """All places for quantizers; and the names of the first and last layers."""
    if structure is None:
        return layer_sites(model, include)
    unseen = _unseen_sites(model, structure, include, overrides)
    return (*structure.sites, *unseen), {*structure.first, *structure.last}


def _unseen_sites(
    model: nn.Module,
    structure: Structure,
    include: Sequence[str] | str | None,
    overrides: Mapping[str, Override] | None,
) -> list[Site]:
    """Sites, by class, of layers that the dry run did not reach; of parts that are not of the network if named."""
    inside, named, _ = _unseen(model, structure, include, overrides)
    return [site for name, module in layers(model) if name in inside | named for site in _sites_of(name, module)]


def left_in_float(
    model: nn.Module,
    structure: Structure,
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    overrides: Mapping[str, Override] | None,
) -> list[str]:
    """Layers of `KINDS` in parts that the dry run did not enter, which neither include, exclude nor overrides name."""
    _, _, left = _unseen(model, structure, include, overrides)
    return [name for name in left if not any(matches(pattern, name) for pattern in _patterns(exclude))]


def _unseen(
    model: nn.Module,
    structure: Structure,
    include: Sequence[str] | str | None,
    overrides: Mapping[str, Override] | None,
) -> tuple[set[str], set[str], list[str]]:
    """Layers that the dry run did not reach: of the network; of other parts, but named; and others still."""
    inside, outside = unseen_layers(model, structure, KINDS)
    seen = {site.layer for site in structure.sites} | {operation.name for operation in structure.operations}
    named = only_matching([*_patterns(include), *(overrides or ())], outside, seen | set(inside))
    left = [name for name in outside if name not in named] if include is None else []
    return set(inside), named, left


def _patterns(given: Sequence[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _sites_of(name: str, module: nn.Module, first: Collection[str] = ()) -> list[Site]:
    """The sites of a layer told by its class."""
    found = [Site(name, "weight", "weight")]
    if not isinstance(module, nn.Embedding):
        found.append(Site(name, "input", "activation", network_input=name in first))
    return found


def _apply_override(
    sites: Sequence[Site],
    wanted: dict[str, QuantSpec | None],
    chosen: set[str],
    pattern: str,
    override: Override,
    symmetric: bool,
) -> None:
    if not isinstance(override, Mapping) or not override or set(override) - {"weights", "activations"}:
        raise SpecError(
            f"overrides[{pattern!r}]={override!r}; expected a mapping with 'weights' and/or 'activations', "
            "such as {'weights': 2}"
        )
    matched = select(
        pattern, [name for name in dict.fromkeys(s.layer for s in sites) if name in chosen], argument="overrides"
    )
    for site in sites:
        if site.layer not in matched or site.role == "result" or (site.role == "skip" and wanted[site.name] is None):
            continue
        if site.role == "weight" and "weights" in override:
            width = override["weights"]
            wanted[site.name] = None if width is None else weight_spec(width, symmetric)
        elif site.role != "weight" and "activations" in override:
            width = override["activations"]
            wanted[site.name] = None if width is None else activation_spec(width)


def _with_owners(planned: dict[str, tuple[Site, QuantSpec]], share_concats: bool) -> dict[str, PlannedSite]:
    """Give sites that read one tensor, or on request parts of one concatenation, the quantizer of the first of them."""
    first: dict[tuple[object, QuantSpec], str] = {}
    plan = {}
    for name, (site, spec) in planned.items():
        owner = None
        if site.role != "weight":
            by_concat = share_concats and site.concat is not None
            key = (site.concat if by_concat else site.shares or name, spec)
            owner = first.setdefault(key, name)
        plan[name] = PlannedSite(site, spec, None if owner == name else owner)
    return plan


def first_and_last(model: nn.Module, names: list[str]) -> tuple[set[str], set[str]]:
    """Names of the layers that see the network's input, and of those that give its output."""
    if not names:
        return set(), set()
    for prefix, module in model.named_modules():
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, Mapping) and (config.get("first_conv") or config.get("classifier")):
            first, last = (_timm_layers(config.get(key), prefix, names) for key in ("first_conv", "classifier"))
            return first or {names[0]}, last or {names[-1]}
    return {names[0]}, {names[-1]}


def _timm_layers(value: object, prefix: str, names: list[str]) -> set[str]:
    """The layers a timm config names, under the prefix of the timm model; a classifier that was removed is none."""
    given = [value] if isinstance(value, str) else value if isinstance(value, (tuple, list)) else []
    return {f"{prefix}.{name}".lstrip(".") for name in given} & set(names)
