"""Weights of functional calls as they are stored: which can be codes in the place of a float parameter.

A parameter becomes codes if calls alone read it, each through a quantizer, and if the parts that they read make up all
of it: one for a linear map, three for the queries, keys and values of an attention. Else it stays float, which
`CallWeight.reason` explains.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.interception import add_call_quantizer, call_quantizers, remove_call_quantizers
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import float_weight, weight_quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.site import Site
from lq.structure.sources import Source, known_sources

_UNKNOWN = "no parameter as it is, another one at each call, or of a checkpoint, which does not tell where it is kept"
_OF_LAYER = "the quantized weight of a layer"


@dataclass(frozen=True, eq=False)
class CallWeight:
    """A weight that a call multiplies by.

    Args:
        module: name of the module that makes the call.
        place: the operand, such as "linear_0_weight".
        quantizer: its quantizer.
        key: name of the parameter in the model's state dict; "": there is none.
        parameter: the float parameter.
        source: which part of it the weight is.
        reason: why the parameter stays float; "": it is stored as codes.
        again: another call has the same weight, by the same grid, and comes first.
    """

    module: str
    place: str
    quantizer: WeightQuantizer
    key: str = ""
    parameter: nn.Parameter | None = None
    source: Source | None = None
    reason: str = ""
    again: bool = False

    @property
    def name(self) -> str:
        """Name of the operand in the model."""
        return f"{self.module}.{self.place}".lstrip(".")

    @property
    def call(self) -> str:
        """Name of the call in the model."""
        return Site(self.module, self.place, "weight").layer

    @property
    def weight(self) -> Tensor | None:
        """The float weight; None if it is not known."""
        if self.source is None or self.parameter is None:
            return None
        return self.source.view(self.parameter.detach())


def call_weights(model: nn.Module) -> list[CallWeight]:
    """The weights of all calls that have a quantizer for them, in the model's order."""
    keys: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            keys.setdefault(id(value), []).append(key)
    of_layers = {id(float_weight(module)) for module in model.modules() if weight_quantizer(module) is not None}
    weights = [_resolved(weight, module, keys, of_layers) for weight, module in _at_calls(model)]
    by_parameter: dict[int, list[CallWeight]] = {}
    for weight in weights:
        if weight.source is not None and not weight.reason:
            by_parameter.setdefault(id(weight.parameter), []).append(weight)
    checked = {id(old): new for group in by_parameter.values() for old, new in _checked(group, keys)}
    return [checked.get(id(weight), weight) for weight in weights]


def stored_weights(model: nn.Module) -> list[CallWeight]:
    """Those that are stored as codes, each once."""
    return [weight for weight in call_weights(model) if not weight.reason and not weight.again]


def stay_float(model: nn.Module) -> str:
    """Which weights of calls are stored in float, and why, in a sentence; "" if all are stored as codes."""
    left = [weight for weight in call_weights(model) if weight.reason not in ("", _OF_LAYER)]
    if not left:
        return ""
    named = ", ".join(f"{weight.name} ({weight.reason})" for weight in left[:3])
    return f"{len(left)} weights of functions are stored in float: {named}{', ...' if len(left) > 3 else ''}"


def read_from(quantizer: WeightQuantizer, source: Source | None) -> None:
    """Note where the weight of a call is kept."""
    if source is not None:
        quantizer.source, quantizer.layout = source, source.layout


def note_known_sources(model: nn.Module) -> None:
    """Note where torch's own modules keep weights of which only the quantizers are known, as from a checkpoint."""
    for module in model.modules():
        weights = {slot: q for slot, q in call_quantizers(module).items() if isinstance(q, WeightQuantizer)}
        for slot, source in known_sources(module, weights):
            if weights[slot].source is None and weights[slot].bits.numel() in (1, source.channels):
                read_from(weights[slot], source)


def find_range(quantizer: WeightQuantizer, module: nn.Module) -> bool:
    """Find the range of the weight of a call of `module` where it is kept; False: that is not known."""
    source = quantizer.source
    parameter = None if source is None else source.within(module)
    if source is None or parameter is None:
        return False
    quantizer.calibrate(source.view(parameter.detach()))
    return True


def find_range_in(quantizer: WeightQuantizer, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Find the range of a weight at a call in a float checkpoint, or have the next call find it."""
    source = quantizer.source
    weight = None if source is None else state_dict.get(prefix + source.parameter)
    quantizer.forget_range()
    if source is not None and isinstance(weight, Tensor) and source.fits(weight):
        quantizer.calibrate(source.view(weight.to(quantizer.bits.device)))


@torch.no_grad()
def bake_calls(model: nn.Module) -> None:
    """Leave the quantized values in the parameters that functions use, and remove the quantizers there."""
    baked = [call for call in call_weights(model) if not call.reason]
    values: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for call in baked:
        if not call.again and call.parameter is not None and call.source is not None and call.weight is not None:
            copied = call.parameter, call.parameter.detach().clone().contiguous()
            _, values_of = values.setdefault(id(call.parameter), copied)
            call.source.view(values_of).copy_(call.quantizer(call.weight))
    for parameter, values_of in values.values():
        parameter.copy_(values_of)
    if baked:
        gone = {(call.module, call.place) for call in baked}
        staying = [
            (module, place, quantizer)
            for name, module in model.named_modules()
            for place, quantizer in call_quantizers(module).items()
            if (name, place) not in gone
        ]
        remove_call_quantizers(model)
        for module, place, quantizer in staying:
            add_call_quantizer(module, place, quantizer)


def _at_calls(model: nn.Module) -> Iterator[tuple[CallWeight, nn.Module]]:
    for name, module in model.named_modules():
        for place, part in call_quantizers(module).items():
            quantizer = part.owner if isinstance(part, SharedQuantizer) else part
            if isinstance(quantizer, WeightQuantizer):
                yield CallWeight(name, place, quantizer), module


def _resolved(weight: CallWeight, module: nn.Module, keys: dict[int, list[str]], of_layers: set[int]) -> CallWeight:
    """The weight with its parameter, or the reason why it has none."""
    source = weight.quantizer.source
    if source is None:
        return replace(weight, reason=_UNKNOWN)
    parameter = source.within(module)
    owner = module.get_submodule(source.parameter.rpartition(".")[0])
    if parameter is None and weight_quantizer(owner) is not None:
        return replace(weight, reason=_OF_LAYER)
    if parameter is None or id(parameter) not in keys:
        return replace(weight, reason=f"{source.parameter} is computed")
    weight = replace(weight, parameter=parameter, source=source, key=keys[id(parameter)][0])
    if not source.alone:
        return replace(weight, reason=f"{weight.key} is used in float as well")
    if id(parameter) in of_layers:
        return replace(weight, reason=f"{weight.key} is the weight of a layer as well")
    return weight


def _checked(weights: list[CallWeight], keys: dict[int, list[str]]) -> list[tuple[CallWeight, CallWeight]]:
    """The weights of one parameter, and what they are with the reason why it stays float, if there is one."""
    parameter = weights[0].parameter
    read = {f"{w.module}.{w.quantizer.source.parameter}".lstrip(".") for w in weights if w.quantizer.source}
    reason = ""
    if parameter is None or any(key not in read for key in keys[id(parameter)]):
        reason = f"{weights[0].key} belongs to another module as well"
    first: dict[tuple[object, ...], CallWeight] = {}
    checked = []
    for weight in weights:
        source = weight.source
        one = first.setdefault((source.offset, source.stride, source.shape) if source else (), weight)
        checked.append((weight, one is not weight))
        if one is not weight and not _same_grid(one, weight):
            reason = reason or f"{weight.key} has several grids"
    if not reason and parameter is not None and not _covers(parameter, [w.source for w in first.values() if w.source]):
        reason = f"only parts of {weights[0].key} are quantized"
    return [(w, replace(w, reason=reason, again=again and not reason)) for w, again in checked]


def _same_grid(one: CallWeight, other: CallWeight) -> bool:
    a, b = one.quantizer, other.quantizer
    if a is b:
        return True
    if one.source is None or other.source is None or one.source.layout != other.source.layout:
        return False
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("log2_step", "zero_point", "bits"))


def _covers(parameter: Tensor, sources: list[Source]) -> bool:
    """Whether the parts are disjoint and make up the whole parameter."""
    if sum(source.numel for source in sources) != parameter.numel():
        return False
    if len(sources) == 1 and sources[0].stride is None:
        return True
    readers = torch.zeros(parameter.shape, dtype=torch.uint8)
    for source in sources:
        source.view(readers).add_(1)
    return bool((readers == 1).all())
