"""Which tensors of a model get which spec: layer kinds, name patterns, first and last layers.

"First and last" follows BRECQ and QDrop: the first layer's weight, the last layer's weight and the last layer's input
have at least 8 bits; the network's input is not quantized (an image has 256 levels already). A timm model says which
layers these are; for others they are the first and last in the order of registration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import nn

from lq.errors import SpecError
from lq.patterns import select
from lq.sites import layers
from lq.spec import QuantSpec, activation_spec, check_bits, weight_spec

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


class Override(TypedDict, total=False):
    """Other widths for the layers that a pattern matches."""

    weights: Width
    activations: Width


@dataclass(frozen=True)
class LayerPlan:
    """What is quantized at one layer: specs of its weight and of its input; None stays float."""

    weight: QuantSpec | None
    input: QuantSpec | None


def plan_layers(
    model: nn.Module,
    weights: Width,
    activations: Width,
    *,
    first_last: int | None = 8,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    overrides: Mapping[str, Override] | None = None,
) -> dict[str, LayerPlan]:
    """The specs of every layer to quantize, by name, in order of registration; see `lq.attach` for the arguments."""
    weight = None if weights is None else weight_spec(weights)
    activation = None if activations is None else activation_spec(activations)
    if weight is None and activation is None and not overrides:
        raise SpecError("weights=None and activations=None leave nothing to quantize; give at least one a width")
    if first_last is not None:
        check_bits(first_last)
    named = dict(layers(model))
    kinds = [name for name, module in named.items() if isinstance(module, KINDS)]
    chosen = set(kinds) if include is None else select(include, named, argument="include")
    if exclude is not None:
        chosen -= select(exclude, named, argument="exclude")
    edges = first_and_last(model, kinds)
    plan: dict[str, LayerPlan] = {}
    for name, module in named.items():
        if name not in chosen:
            continue
        layer_weight, layer_input = weight, activation
        if isinstance(module, nn.Embedding) or name in edges[0]:
            layer_input = None
        if first_last is not None and name in edges[0] | edges[1]:
            layer_weight = layer_weight and layer_weight.at_least(first_last)
            layer_input = layer_input and layer_input.at_least(first_last)
        plan[name] = LayerPlan(layer_weight, layer_input)
    for pattern, override in (overrides or {}).items():
        _apply_override(plan, pattern, override)
    return {name: layer for name, layer in plan.items() if layer.weight or layer.input}


def _apply_override(plan: dict[str, LayerPlan], pattern: str, override: Override) -> None:
    if not isinstance(override, Mapping) or not override or set(override) - {"weights", "activations"}:
        raise SpecError(
            f"overrides[{pattern!r}]={override!r}; expected a mapping with 'weights' and/or 'activations', "
            "such as {'weights': 2}"
        )
    for name in select(pattern, plan, argument="overrides"):
        layer_weight, layer_input = plan[name].weight, plan[name].input
        if "weights" in override:
            width = override["weights"]
            layer_weight = None if width is None else weight_spec(width)
        if "activations" in override:
            width = override["activations"]
            layer_input = None if width is None else activation_spec(width)
        plan[name] = LayerPlan(layer_weight, layer_input)


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
