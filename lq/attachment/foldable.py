"""Find BatchNorms that can be folded into a convolution, and say why others cannot.

Each module that holds a BatchNorm is traced, its children taken as they are (torch.fx with every child a leaf). This
needs no example input and no traceable model: only the few lines between a convolution and its norm must be free of
control flow on tensors. A pair is sure if its norm is the only reader of the convolution's output wherever the two are
called: in training and in eval mode, with every default argument and every switch (an attribute that is True or False)
as it is and otherwise, in the modules around, and in their other methods (whose calls are read from the source). A
convolution or a norm whose result somebody else sees, by a hook or by keeping it, is in no sure pair.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lq.structure.forward_paths import KEPT, ForwardPath, follow
from lq.structure.method_calls import outside_calls, read_by_forward, replaces_parameters, switches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: At most so many constants of a forward are tried for an argument.
_TRIED = 8


@dataclass(frozen=True)
class FoldablePair:
    """Names of a convolution and of the BatchNorm that alone reads its output, or that it alone reads."""

    conv: str
    norm: str
    norm_first: bool = field(default=False, repr=False)

    @property
    def order(self) -> tuple[str, str]:
        """The two names, the one that is called first in front."""
        return (self.norm, self.conv) if self.norm_first else (self.conv, self.norm)


@dataclass(frozen=True)
class UnfoldedNorm:
    """A BatchNorm beside a convolution that is not folded into it.

    Args:
        norm: name of the norm.
        conv: name of the convolution.
        reason: why, as a sentence without its subject.
        advice: what the caller can do about it; empty if there is nothing to do.
    """

    norm: str
    conv: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.norm} behind {self.conv}: {self.reason}" + (f" ({self.advice})" if self.advice else "")


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
    found = [_Module(name, module) for name, module in model.named_modules() if _holds_norm(module)]
    _trace(model, found)
    proposed = list(dict.fromkeys(pair for part in found for pair in part.pairs))
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
        _judge(model, pair, found, result)
    for other in (other for part in found for other in part.others()):
        if other.norm not in first:
            others.setdefault(other.norm, other)
    result.others += others.values()
    return result


def _trace(model: nn.Module, found: list["_Module"]) -> None:
    """Follow all forwards in training and in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        for training in (True, False):
            for module in modes:
                module.training = training
            for part in found:
                part.trace(training)
    finally:
        for module, training in modes.items():
            module.training = training


def _judge(model: nn.Module, pair: FoldablePair, found: list["_Module"], result: Search) -> None:
    """Note what speaks against a pair."""
    reason, advice = _watched(model, pair) or _without_numbers(model, pair) or ("", "")
    unrun = False
    if not reason:
        against = [doubt for part in found if (doubt := part.against(pair))]
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


# --- one module and the ways through its forward --------------------------------------------------------------------


class _Module:
    """A module with a BatchNorm somewhere inside, and what is known of the ways through it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.paths: list[ForwardPath] = []
        self.pairs: dict[FoldablePair, None] = {}
        self.refused: list[UnfoldedNorm] = []
        self.error = ""
        self.unknown: dict[str, None] = {}  # arguments that decide, of which no other value is known

    def trace(self, training: bool) -> None:
        """Follow the forward in the mode that all modules are in, with default arguments and others."""
        module = self.module
        if type(module) is nn.Sequential:
            for before, after in pairwise(module._modules):
                self._propose(before, after)
            return
        if type(module) in _CONTAINERS or "_orig_mod" in module._modules or isinstance(module, torch.jit.ScriptModule):
            return
        parameters = inspect.signature(type(module).forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        path, error = follow(module, defaults)
        self.paths.append(path)
        if not path.complete:
            self.error = f"{type(module).__name__}.forward cannot be followed in {_mode(training)} mode: {error}"
            return
        for node in path.graph.nodes:
            read = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
            if isinstance(read, fx.Node) and read.op == "call_module":
                self._propose(str(read.target), str(node.target), path)
        if self.pairs:
            for name in defaults:
                self._vary(name, defaults)
            for name in switches(module):
                path, _ = follow(module, defaults, {name: not vars(module)[name]})
                if path.complete:  # else no way that is known to exist
                    path.attribute = name
                    self.paths.append(path)

    def _propose(self, before: str, after: str, path: ForwardPath | None = None) -> None:
        """Note the pair of what ends one child and begins the next, if they are a convolution and a norm."""
        earlier, later = _end_of(self.module, before, -1), _end_of(self.module, after, 0)
        first, second = self.module.get_submodule(earlier), self.module.get_submodule(later)
        if isinstance(first, CONVOLUTIONS) and is_norm(second):
            pair = FoldablePair(_join(self.name, earlier), _join(self.name, later))
        elif is_norm(first) and not has_act(first) and _does_not_pad(second):
            pair = FoldablePair(_join(self.name, later), _join(self.name, earlier), norm_first=True)
        else:
            return
        reason = "" if path is None else path.against(earlier, later)
        if not reason or reason.endswith(KEPT):
            self.pairs[pair] = None
        elif not pair.norm_first:
            self.refused.append(UnfoldedNorm(pair.norm, pair.conv, f"in {type(self.module).__name__}.forward {reason}"))

    def _vary(self, name: str, defaults: dict[str, Any]) -> None:
        """Follow the forward with other values of one argument that has a default."""
        default = defaults[name]
        others = {key: value for key, value in defaults.items() if key != name}
        if isinstance(default, bool):
            tried = [{**others, name: not default}]
        else:
            path, _ = follow(self.module, others)  # any value: no code may look at it
            path.argument = name
            self.paths.append(path)
            if path.complete:
                return
            code = getattr(type(self.module).forward, "__code__", None)
            constants = [c for c in getattr(code, "co_consts", ()) if type(c) is type(default) and c != default]
            values = [*constants[:_TRIED], *_others(default)]
            tried = [{**others, name: value} for value in values]
        complete = False
        for concrete in tried:
            path, _ = follow(self.module, concrete)
            path.argument = name
            self.paths.append(path)
            complete = complete or path.complete
        if not complete:
            self.unknown[name] = None

    def against(self, pair: FoldablePair) -> tuple[str, bool] | None:
        """What speaks against a pair here, and whether an example that runs it would settle that."""
        inside = [name for name in pair.order if not self.name or name.startswith(f"{self.name}.")]
        if len(inside) < 2:
            return None
        first, second = (name[len(self.name) + 1 if self.name else 0 :] for name in pair.order)
        kind = type(self.module).__name__
        for path in self.paths:
            reason = path.against(first, second)
            if reason and not path.argument:  # whoever has set an attribute may set it anew
                when = f", {path.attribute} decides: if it is set otherwise," if path.attribute else ""
                return f"in {kind}.forward{when} {reason}", False
            if reason:  # the code around a module says what it is called with, that around the model may be any
                return f"in {kind}.forward, {path.argument} decides: with another value {reason}", bool(self.name)
        if pair in self.pairs and self.error:
            return self.error, True
        if pair in self.pairs and self.unknown:
            return f"in {kind}.forward, {next(iter(self.unknown))} decides what is run", bool(self.name)
        return self._by_source(first, second)

    def _by_source(self, first: str, second: str) -> tuple[str, bool] | None:
        """What the source of the module's methods says against a pair."""
        kind = type(self.module).__name__
        cut = bool(self.paths) and not all(
            path.complete for path in self.paths if not (path.argument or path.attribute)
        )
        if cut and any(read_by_forward(self.module, name) for name in (first, second)):
            return f"{kind}.forward reads a parameter of the two", False
        if called := outside_calls(self.module, first, second, forward=cut):
            return f"{kind}.{called} calls only one of the two", False
        if called := replaces_parameters(self.module):
            return f"{kind}.{called} calls modules with other parameters than their own", True
        return None

    def others(self) -> Iterator[UnfoldedNorm]:
        """Norms behind a convolution that cannot be folded into it, or of which the forward does not tell."""
        yield from self.refused
        children = list(self.module.named_children()) if self.error else []
        for (conv, before), (norm, after) in pairwise(children):
            if isinstance(before, CONVOLUTIONS) and is_norm(after):
                yield UnfoldedNorm(_join(self.name, norm), _join(self.name, conv), self.error)


def _others(default: Any) -> list[Any]:
    """Other values of an argument that has this default."""
    if default is None:
        return [True, False]
    if isinstance(default, (int, float)):
        return [default + 1, default - 1, type(default)(0)]
    return [""] if isinstance(default, str) else []


def _mode(training: bool) -> str:
    return "training" if training else "eval"


# --- kinds of modules -----------------------------------------------------------------------------------------------


def _end_of(parent: nn.Module, name: str, index: int) -> str:
    """The first (0) or last (-1) module of a Sequential, and of Sequentials in it; any other module is its own end."""
    module = parent.get_submodule(name)
    while type(module) is nn.Sequential and len(module):
        child = list(module._modules)[index]
        name, module = f"{name}.{child}", module[index]
    return name


def _holds_norm(module: nn.Module) -> bool:
    return any(is_norm(inner) for inner in module.modules() if inner is not module)


def is_norm(module: nn.Module) -> bool:
    """A BatchNorm with running statistics: torch's own, a frozen one, or timm's with an activation behind."""
    frozen = type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
    if not (frozen or isinstance(module, _NORMS)) or module.running_mean is None or module.running_var is None:
        return False
    return frozen or type(module) in _NORMS or has_act(module)


def has_act(norm: nn.Module) -> bool:
    """Whether it is one of timm's norms with a drop and an activation behind."""
    names = {cls.__name__ for cls in type(norm).__mro__}
    known = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
    return bool(names & known) and hasattr(norm, "drop") and hasattr(norm, "act")


def _does_not_pad(module: nn.Module) -> bool:
    """A plain convolution that adds no zeros around what it reads."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or type(module) not in CONVOLUTIONS:
        return False
    return module.padding == "valid" or (module.padding != "same" and not any(map(int, module.padding)))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
