"""What a prepared model remembers of its rescalings, so that checkpoints of the float model before still load.

The innermost module around all rescaled pairs has them, and adds two entries to its state dict:
``lq_preparation_extra_state``, the pairs as JSON, and ``lq_preparation_values``, their r and t (not in packed files). A
state dict that has them is of a prepared model; one that has not is of the model as it was, and is rescaled on the way
in (BatchNorms that the model has folded are folded first), or refused where that cannot be.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.folded import fold_checkpoint
from lq.attachment.preparation.parts import Pair, Rescaling
from lq.attachment.sites import INPUT, WEIGHT_STATE, float_weight
from lq.errors import DataError, StateError

#: Entries of a prepared model's state dict.
PLAN, VALUES = "lq_preparation_extra_state", "lq_preparation_values"

_KEPT = "_lq_rescalings"


class _Kept:
    """The rescalings of the pairs below a module.

    Args:
        rescalings: by name of the maker's weight, as named in the module.
        known: whether r and t are known; packed files do not have them.
        rotated: whether the residual stream was rotated before.
        biases: those that rotating has made.
    """

    def __init__(self) -> None:
        self.rescalings: dict[str, Rescaling] = {}
        self.known = True
        self.rotated = False
        self.biases: list[str] = []

    @property
    def plan(self) -> "_Plan":
        """What was done, without the numbers."""
        return _Plan([one.pair for one in self.rescalings.values()], self.rotated, self.biases)


@dataclass
class _Plan:
    """What was done to a model: the pairs that were rescaled, and whether its stream was rotated."""

    pairs: list[Pair]
    rotated: bool = False
    biases: list[str] = field(default_factory=list)

    @property
    def made(self) -> list[str]:
        """Names of the biases that were made."""
        readers = [reader for pair in self.pairs for reader in pair.readers]
        return [*self.biases, *(reader.bias for reader in readers if reader.bias is not None and reader.makes_bias)]


def is_marker(key: str) -> bool:
    """Whether an entry of a state dict is one of those that tell that the model is prepared."""
    return key.rpartition(".")[2] in (PLAN, VALUES)


def parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by name, the float one where it has a quantizer; None: it is not there."""
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    return float_weight(module) if last == "weight" else module._parameters.get(last)


@torch.no_grad()
def write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters values; biases that are not there are made."""
    for name, value in values.items():
        found = parameter(model, name)
        if found is None:
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            weight = float_weight(module)
            module._parameters[last] = nn.Parameter(value if weight is None else value.to(weight.device))
        else:
            found.copy_(value)


def rescalings(model: nn.Module) -> dict[str, Rescaling]:
    """All rescalings of a model, by the name of the weight of what makes the tensor; shared ones are not copied."""
    found = {}
    for prefix, module in model.named_modules():
        for name, one in (module.__dict__[_KEPT].rescalings if _KEPT in module.__dict__ else {}).items():
            pair = one.pair.renamed(lambda inner, prefix=prefix: _join(prefix, inner))
            found[_join(prefix, name)] = Rescaling(pair, one.scale, one.shift)
    return found


def remember(model: nn.Module, done: Sequence[Rescaling]) -> None:
    """Have the model know what its pairs were rescaled with, beside what it knows."""
    done = [one if bool(one.shift.any()) else replace(one, pair=one.pair.without_new_biases()) for one in done]
    holders = {name: module for name, module in model.named_modules() if _KEPT in module.__dict__}
    new = []
    for one in done:
        known = (n for n, module in holders.items() if _below(one.pair, n) in module.__dict__[_KEPT].rescalings)
        holder = next(known, None)
        if holder is None:
            new.append(one)
            continue
        kept = holders[holder].__dict__[_KEPT].rescalings
        key = _below(one.pair, holder)
        kept[key] = kept[key].then(one.scale, one.shift)
        if any(reader.makes_bias for reader in one.pair.readers):
            kept[key].pair = _within(one.pair, holder)
    if not new:
        return
    names = [name.split(".")[:-1] for one in new for name in _names(one.pair)]
    around = next((name for name in holders if all(_is_below(n, name) for o in new for n in _names(o.pair))), None)
    prefix = ".".join(os.path.commonprefix(names)) if around is None else around
    kept = _holder(model.get_submodule(prefix)).rescalings
    for one in new:
        pair = _within(one.pair, prefix)
        kept[pair.maker.weight] = Rescaling(pair, one.scale, one.shift)


def remember_rotation(model: nn.Module, names: Sequence[str], made: Sequence[str]) -> None:
    """Have the model know that parameters were rotated, and which biases were made for that."""
    prefix = ".".join(os.path.commonprefix([name.split(".")[:-1] for name in names]))
    kept = _holder(model.get_submodule(prefix))
    kept.rotated = True
    kept.biases = [name[len(prefix) + 1 :] if prefix else name for name in made]


def is_prepared(model: nn.Module) -> bool:
    """Whether any part of the model was rescaled or rotated."""
    return any(_KEPT in module.__dict__ for module in model.modules())


def match(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Have `model` know the pairs that a state dict, which is loaded next, was rescaled at; no value is changed.

    Raises:
        DataError: if the entries of the state dict are damaged, or name parameters that the model does not have.
    """
    theirs = {key: _read(key, value) for key, value in state_dict.items() if key.rpartition(".")[2] == PLAN}
    mine = {_join(name, PLAN): m.__dict__[_KEPT].plan for name, m in model.named_modules() if _KEPT in m.__dict__}
    if mine == theirs:
        return
    for module in list(model.modules()):
        if _KEPT in module.__dict__:
            _forget(module)
    for key, plan in theirs.items():
        prefix = key.rpartition(".")[0]
        try:
            _adopt(model.get_submodule(prefix), plan)
        except AttributeError as error:
            raise DataError(f"{key} in the checkpoint is of a module that {type(model).__name__} has not") from error


def made_biases(state_dict: Mapping[str, Any]) -> set[str]:
    """Names of biases that preparing has made, according to the entries of a state dict."""
    found = set()
    for key, value in state_dict.items():
        if key.rpartition(".")[2] == PLAN and isinstance(value, Tensor):
            found |= {_join(key.rpartition(".")[0], name) for name in _read(key, value).made}
    return found


# --- the module that remembers --------------------------------------------------------------------------------------


def _holder(module: nn.Module) -> _Kept:
    if _KEPT not in module.__dict__:
        module.__dict__[_KEPT] = _Kept()
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_rescale_checkpoint)
    kept: _Kept = module.__dict__[_KEPT]
    return kept


def _forget(module: nn.Module) -> None:
    kept: _Kept = module.__dict__.pop(_KEPT)
    for name in kept.plan.made:
        parent, _, last = name.rpartition(".")
        module.get_submodule(parent)._parameters[last] = None
    tables: tuple[dict[int, Any], ...] = (module._state_dict_hooks, module._load_state_dict_pre_hooks)
    for table in tables:
        for key in [key for key, hook in table.items() if getattr(hook, "hook", hook) in (_save, _rescale_checkpoint)]:
            del table[key]


def _adopt(module: nn.Module, plan: _Plan) -> None:
    weights = [reader.weight for pair in plan.pairs for reader in pair.readers]
    layers = {name: f"{name.rpartition('.')[0]}.weight".lstrip(".") for name in plan.made}
    if missing := [name for name in (*weights, *layers.values()) if parameter(module, name) is None]:
        raise AttributeError(missing[0])
    kept = _holder(module)
    kept.known, kept.rotated, kept.biases = False, plan.rotated, plan.biases
    for pair in plan.pairs:
        kept.rescalings[pair.maker.weight] = Rescaling(pair, torch.ones(pair.channels), torch.zeros(pair.channels))
    for name, layer in layers.items():
        weight = parameter(module, layer)
        if weight is not None and parameter(module, name) is None:
            write(module, {name: weight.detach().new_zeros(weight.shape[0])})


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: add what the module was rescaled with."""
    kept: _Kept = module.__dict__[_KEPT]
    pairs = [pair.to_dict() for pair in kept.plan.pairs]
    plan = {"pairs": pairs, "rotated": kept.rotated, "biases": kept.biases}
    text = json.dumps(plan, separators=(",", ":")).encode()
    state_dict[f"{prefix}{PLAN}"] = torch.tensor(list(text), dtype=torch.uint8)
    if kept.known and pairs:
        both = [torch.stack([one.scale, one.shift]) for one in kept.rescalings.values()]
        state_dict[f"{prefix}{VALUES}"] = torch.cat(both, 1)


def _rescale_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict hook: rescale a checkpoint of the model as it was before; take over what a prepared one says."""
    kept: _Kept = module.__dict__[_KEPT]
    plan, values = state_dict.pop(f"{prefix}{PLAN}", None), state_dict.pop(f"{prefix}{VALUES}", None)
    if plan is not None:
        if kept.plan != _read(f"{prefix}{PLAN}", plan):
            raise StateError("the checkpoint is of a model that was prepared at other layers; load it with lq.load")
        _take_values(kept, values)
        return
    for name, part in module.named_modules():
        fold_checkpoint(part, state_dict, prefix + (f"{name}." if name else ""))
    if kept.rotated and any(key.startswith(prefix) for key in state_dict):
        raise StateError(
            "the checkpoint is of a model whose residual stream was not rotated, and this one's is: load a quantized "
            "checkpoint with lq.load, a float one into the model as its code builds it, and prepare that"
        )
    if not any(f"{prefix}{pair.maker.weight}" in state_dict for pair in kept.plan.pairs):
        return
    if any(WEIGHT_STATE in key or f"{INPUT}." in key for key in state_dict if key.startswith(prefix)):
        raise StateError(
            "the checkpoint has quantizers of a model that was not prepared, and this one is prepared: load it with "
            "lq.load, which takes that back"
        )
    if not kept.known:
        raise StateError(
            "the checkpoint is of the model before it was prepared, and this one was loaded from a packed file, which "
            "does not say by how much it was rescaled; load it into the model as its code builds it, and prepare that"
        )
    _rescale(kept, state_dict, prefix)


def _rescale(kept: _Kept, state_dict: dict[str, Any], prefix: str) -> None:
    new: dict[str, Tensor] = {}

    def get(name: str) -> Tensor | None:
        return new[name] if name in new else state_dict.get(prefix + name)

    for one in kept.rescalings.values():
        try:
            new.update(one.parameters(get))
        except KeyError as missing:
            raise StateError(
                f"the checkpoint has no {prefix}{missing.args[0]}, which lq.prepare has rescaled together with "
                f"{prefix}{one.pair.maker.weight}: load both, or neither"
            ) from missing
        except RuntimeError:  # other shapes: torch tells
            return
    state_dict.update({prefix + name: value for name, value in new.items()})


def _take_values(kept: _Kept, values: Any) -> None:
    channels = [pair.channels for pair in kept.plan.pairs]
    kept.known = isinstance(values, Tensor) and tuple(values.shape) == (2, sum(channels))
    if kept.known:
        parts = values.detach().cpu().float().split(channels, 1)
        for one, part in zip(kept.rescalings.values(), parts, strict=True):
            one.scale, one.shift = part[0].clone(), part[1].clone()


def _read(key: str, value: Any) -> _Plan:
    try:
        plan = json.loads(bytes(value.tolist()).decode())
        return _Plan([Pair.from_dict(pair) for pair in plan["pairs"]], bool(plan["rotated"]), list(plan["biases"]))
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{key} in the checkpoint is damaged: it should be what lq.prepare has rescaled") from error


def _within(pair: Pair, prefix: str) -> Pair:
    """The pair as it is named in a module around it."""
    return pair.renamed(lambda name: name[len(prefix) + 1 :] if prefix else name)


def _names(pair: Pair) -> list[str]:
    return [pair.maker.weight, *(reader.weight for reader in pair.readers)]


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _below(pair: Pair, prefix: str) -> str:
    """Name of the pair in a module around it; one that is not there, if it is not below."""
    name = pair.maker.weight
    if not _is_below(name, prefix):
        return ""
    return name[len(prefix) + 1 :] if prefix else name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
