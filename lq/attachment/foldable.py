"""Find BatchNorms that can be folded into a convolution, and say why others cannot.

Each module that holds a BatchNorm is traced, its children taken as they are (torch.fx with every child a leaf). This
needs no example input and no traceable model: only the few lines between a convolution and its norm must be free of
control flow on tensors. A pair is sure if its norm is the only reader of the convolution's output wherever the two are
called: in training and in eval mode, with every default argument and every switch (an attribute that is True or False)
as it is and otherwise, in the modules around, and in their other methods (whose calls are read from the source). A
convolution or a norm whose result somebody else sees, by a hook or by keeping it, is in no sure pair.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lq.attachment.module_paths import ModulePaths
from lq.attachment.pairs import FoldablePair, UnfoldedNorm, holds_norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Search:
    """What was found in a model.

    Args:
        pairs: all pairs that some path through the code has.
        doubts: why a pair is not sure.
        unrun: those of them that an example which runs the pair settles.
        others: norms that follow a convolution in the module tree and are in no pair.
    """

    pairs: list[FoldablePair]
    doubts: dict[FoldablePair, UnfoldedNorm]
    unrun: set[FoldablePair]
    others: list[UnfoldedNorm]


def foldable_pairs(model: nn.Module) -> list[FoldablePair]:
    """All pairs of a convolution and a BatchNorm that a checkpoint of `model` may have folded.

    `lq.fold_batchnorm` folds those of them that are sure.
    """
    return search(model).pairs


def search(model: nn.Module) -> Search:
    """Find pairs and doubts."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    modules = [ModulePaths(name, module) for name, module in model.named_modules() if holds_norm(module)]
    _trace(model, modules)
    proposed = list(dict.fromkeys(pair for paths in modules for pair in paths.pairs))
    alone: list[FoldablePair] = []
    others: dict[str, UnfoldedNorm] = {}
    for pair in proposed:
        reason = _not_alone(model, pair, names, owners)
        if not reason:
            alone.append(pair)
        elif not pair.norm_first:
            others[pair.norm] = UnfoldedNorm(pair.norm, pair.conv, reason)
    first: dict[str, FoldablePair] = {}
    for pair in sorted(alone, key=lambda pair: pair.norm_first):  # after a convolution before before one
        first.setdefault(pair.norm, pair)
    pairs = [pair for pair in alone if first[pair.norm] == pair]
    result = Search(pairs, {}, set(), [])
    for pair in pairs:
        others.pop(pair.norm, None)
        _judge(model, pair, modules, result)
    for other in (other for paths in modules for other in paths.others()):
        if other.norm not in first:
            others.setdefault(other.norm, other)
    result.others += others.values()
    return result


def _trace(model: nn.Module, modules: list[ModulePaths]) -> None:
    """Follow all forwards in training and in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        for training in (True, False):
            for module in modes:
                module.training = training
            for paths in modules:
                paths.trace(training)
    finally:
        for module, training in modes.items():
            module.training = training


def _judge(model: nn.Module, pair: FoldablePair, modules: list[ModulePaths], result: Search) -> None:
    """Note what speaks against a pair."""
    reason, advice = _watched(model, pair) or _without_numbers(model, pair) or ("", "")
    unrun = False
    if not reason:
        against = [doubt for paths in modules if (doubt := paths.against(pair))]
        if against:
            reason, unrun = min(against, key=lambda doubt: doubt[1])
            advice = "pass example=, a batch that shows the path that is run" if unrun else ""
    if reason:
        result.doubts[pair] = UnfoldedNorm(pair.norm, pair.conv, reason, advice)
        if unrun:
            result.unrun.add(pair)


def _not_alone(model: nn.Module, pair: FoldablePair, names: dict[int, list[str]], owners: Counter[int]) -> str:
    """Why the pair cannot be changed without changing others, or has no weight of its own to change; or nothing."""
    conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
    for name, module in ((pair.conv, conv), (pair.norm, norm)):
        if len(names[id(module)]) > 1:
            return f"{name} is used under several names"
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or len(conv._forward_pre_hooks) > 0 or parametrize.is_parametrized(conv):
        return f"the weight of {pair.conv} is computed or has a hook before it"
    if any(owners[id(p)] > 1 for p in (weight, bias) if p is not None):
        return f"{pair.conv} shares its weight with another layer"
    return ""


def _watched(model: nn.Module, pair: FoldablePair) -> tuple[str, str] | None:
    """Whether somebody looks between the two, or changes what they do: hooks, a forward put on the instance."""
    inside = _common(pair)
    for name in (pair.conv, pair.norm):
        parts = name.split(".")
        for end in range(inside + 1, len(parts) + 1):
            path = ".".join(parts[:end])
            module = model.get_submodule(path)
            if any(len(getattr(module, table, ())) for table in _HOOKS):
                return f"{path} has a hook, which folding would take the values from", "remove the hook first"
            if "forward" in module.__dict__:
                return f"{path}.forward was replaced on the instance", "fold before it is replaced"
    parent = model.get_submodule(".".join(pair.conv.split(".")[:inside]))
    if "forward" in parent.__dict__:
        return f"the forward of {type(parent).__name__} was replaced on the instance", "fold before it is replaced"
    return None


def _without_numbers(model: nn.Module, pair: FoldablePair) -> tuple[str, str] | None:
    """Whether the norm or the convolution has no finite values to fold."""
    conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
    tensors = {f"{pair.norm}.{name}": t for name, t in [*norm.named_parameters(), *norm.named_buffers()]}
    tensors |= {f"{pair.conv}.{name}": t for name, t in conv.named_parameters()}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            return f"{name} has no shape yet", "run the model once first"
        if tensor.is_meta:
            return f"{name} is on the meta device", "give the model its values first"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name} has values that are not finite", "load or estimate the statistics anew"
    variance: Any = norm.running_var
    if bool((variance < 0).any()):
        return f"{pair.norm}.running_var has negative values", "load or estimate the statistics anew"
    return None


def _common(pair: FoldablePair) -> int:
    """Number of names in the path to the module around both."""
    conv, norm = pair.conv.split("."), pair.norm.split(".")
    same = [a == b for a, b in zip(conv, norm, strict=False)]
    return same.index(False) if False in same else len(same)
