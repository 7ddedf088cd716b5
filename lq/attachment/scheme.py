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

from torch import nn

from lq.attachment.options import SiteOptions, Skip
from lq.attachment.sites import float_weight, layers
from lq.attachment.unseen import unseen_layers
from lq.errors import SpecError, StateError
from lq.quantizer.spec import QuantSpec
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


@dataclass(frozen=True)
class PlannedSite:
    """A site, the spec of its quantizer, and the name of the site whose quantizer it uses instead, if there is one."""

    site: Site
    spec: QuantSpec
    owner: str | None = None


def plan_sites(model: nn.Module, options: SiteOptions) -> dict[str, PlannedSite]:
    """The sites to quantize, by name, in order.

    Raises:
        SpecError: if the options leave nothing to quantize.
        StateError: for an option that needs a structure, without one.
        PatternError: for a pattern that matches no layer.
    """
    if options.weights is None and options.activations is None and not options.overrides:
        raise SpecError("weights=None and activations=None leave nothing to quantize; give at least one a width")
    structure = options.read_structure()
    if structure is None and options.needs_structure:
        raise StateError(
            f"{options.needs_structure} needs to know how the tensors flow: pass structure=lq.inspect(model, example)"
        )
    sites, edges = _sites(model, structure, options)
    selected = _selected_layers(model, structure, sites, options)
    specs = {
        site.name: _spec_of(site, edges, set(structure.last) if structure else set(), options)
        if site.layer in selected
        else None
        for site in sites
    }
    for pattern in options.overrides or {}:
        _apply_override(sites, specs, selected, pattern, options)
    planned = {site.name: (site, spec) for site in sites if (spec := specs[site.name]) is not None}
    _use_one_spec_for_each_weight(model, planned)
    covered = {
        name
        for name, (site, spec) in planned.items()
        if site.covered_by and all(_covers(planned, other, spec) for other in site.covered_by)
    }
    floats = {site.source.parameter for site in sites if site.source and site.name not in planned}
    remaining = {n: (_in_company(s, floats), spec) for n, (s, spec) in planned.items() if n not in covered}
    return _with_owners(remaining, options.share_concats)


def _selected_layers(
    model: nn.Module, structure: Structure | None, sites: Sequence[Site], options: SiteOptions
) -> set[str]:
    """Names of the layers and calls with sites that include and exclude leave."""
    selected = {site.layer for site in sites}
    names = dict.fromkeys(site.layer for site in sites)
    if structure is not None:  # a pattern may also name what stays float anyway
        names.update(dict.fromkeys([o.name for o in structure.operations] + [name for name, _ in layers(model)]))
        if options.include is not None:
            selected &= select(options.include, names, argument="include")
    if options.exclude is not None:
        selected -= select(options.exclude, names, argument="exclude")
    return selected


def _spec_of(site: Site, edges: Collection[str], last: Collection[str], options: SiteOptions) -> QuantSpec | None:
    """The spec of a site before overrides; those of the first and last layers (`edges`) have a least width."""
    spec = options.weight_spec(options.weights) if site.role == "weight" else _activation_of(site, options)
    at_edge = site.layer in last or (site.layer in edges and site.role not in ("skip", "result"))
    at_edge = at_edge and (site.layer in last or not _multiplies_states(site))
    if spec is not None and at_edge and options.first_last is not None:
        return spec.at_least(options.first_last)
    return spec


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
        elif site.source is not None and (parameter := site.source.below(site.module).within(module)) is not None:
            part = replace(site.source, parameter="", alone=True)
            uses.setdefault((id(parameter), part), []).append(name)
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


def _activation_of(site: Site, options: SiteOptions) -> QuantSpec | None:
    """The spec of a tensor that is no weight, before exceptions."""
    spec = options.activation_spec(options.activations)
    spec = _with_levels(spec, site, options)
    if (site.role == "activation" or _quantizes(options.skip, site)) and not site.network_input:
        return spec
    return spec.at_least(8) if spec is not None and options.integer and not site.normalized else None


def _with_levels(spec: QuantSpec | None, site: Site, options: SiteOptions) -> QuantSpec | None:
    """A spec of an activation, with the levels that the options give what a softmax or a GELU makes."""
    levels = options.probabilities if site.probabilities else options.gelu if site.gelu else "uniform"
    return spec if spec is None or levels == "uniform" else replace(spec, levels=levels)


def layer_sites(model: nn.Module, include: Sequence[str] | str | None) -> tuple[tuple[Site, ...], set[str]]:
    """Sites of layers told by their class or named by `include`; and the names of the first and last layers."""
    named = dict(layers(model))
    kinds = [name for name, module in named.items() if isinstance(module, KINDS)]
    selected = set(kinds) if include is None else select(include, named, argument="include")
    first, last = first_and_last(model, kinds)
    sites = [site for name, module in named.items() if name in selected for site in _sites_of(name, module, first)]
    return tuple(sites), first | last


def _sites(model: nn.Module, structure: Structure | None, options: SiteOptions) -> tuple[tuple[Site, ...], set[str]]:
    """All places for quantizers; and the names of the first and last layers."""
    if structure is None:
        return layer_sites(model, options.include)
    inside, named, _ = _unseen(model, structure, options)
    unseen = [site for name, module in layers(model) if name in inside | named for site in _sites_of(name, module)]
    return (*structure.sites, *unseen), {*structure.first, *structure.last}


def left_in_float(model: nn.Module, structure: Structure, options: SiteOptions) -> list[str]:
    """Layers of `KINDS` in parts that the dry run did not enter, which neither include, exclude nor overrides name."""
    _, _, left = _unseen(model, structure, options)
    return [name for name in left if not any(matches(pattern, name) for pattern in _patterns(options.exclude))]


def _unseen(model: nn.Module, structure: Structure, options: SiteOptions) -> tuple[set[str], set[str], list[str]]:
    """Layers that the dry run did not reach: of the network; of other parts, but named; and others still."""
    inside, outside = unseen_layers(model, structure, KINDS)
    reached = {site.layer for site in structure.sites} | {operation.name for operation in structure.operations}
    patterns = [*_patterns(options.include), *(options.overrides or ())]
    named = only_matching(patterns, outside, reached | set(inside))
    left = [name for name in outside if name not in named] if options.include is None else []
    return set(inside), named, left


def _patterns(patterns: Sequence[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _sites_of(name: str, module: nn.Module, first: Collection[str] = ()) -> list[Site]:
    """The sites of a layer told by its class."""
    sites = [Site(name, "weight", "weight")]
    if not isinstance(module, nn.Embedding):
        sites.append(Site(name, "input", "activation", network_input=name in first))
    return sites


def _apply_override(
    sites: Sequence[Site],
    specs: dict[str, QuantSpec | None],
    selected: set[str],
    pattern: str,
    options: SiteOptions,
) -> None:
    """Give the sites that a pattern of ``overrides`` matches the widths that it has for them."""
    override = (options.overrides or {})[pattern]
    names = [name for name in dict.fromkeys(site.layer for site in sites) if name in selected]
    matched = select(pattern, names, argument="overrides")
    for site in sites:
        if site.layer not in matched or site.role == "result" or (site.role == "skip" and specs[site.name] is None):
            continue
        if site.role == "weight" and "weights" in override:
            specs[site.name] = options.weight_spec(override["weights"])
        elif site.role != "weight" and "activations" in override:
            specs[site.name] = _with_levels(options.activation_spec(override["activations"]), site, options)


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
    layers_named = [value] if isinstance(value, str) else value if isinstance(value, (tuple, list)) else []
    return {f"{prefix}.{name}".lstrip(".") for name in layers_named} & set(names)
