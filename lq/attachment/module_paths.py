"""The ways through the forward of one module with BatchNorms: which pairs they have, and what speaks against one."""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from lq.attachment.pairs import CONVOLUTIONS, FoldablePair, UnfoldedNorm, does_not_pad, end_of, has_act, is_norm, join
from lq.structure.forward_paths import KEPT, ForwardPath, follow
from lq.structure.method_calls import outside_calls, read_by_forward, replaces_parameters, switches

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: At most so many constants of a forward are tried for an argument.
_TRIED = 8


class ModulePaths:
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
        earlier, later = end_of(self.module, before, -1), end_of(self.module, after, 0)
        first, second = self.module.get_submodule(earlier), self.module.get_submodule(later)
        if isinstance(first, CONVOLUTIONS) and is_norm(second):
            pair = FoldablePair(join(self.name, earlier), join(self.name, later))
        elif is_norm(first) and not has_act(first) and does_not_pad(second):
            pair = FoldablePair(join(self.name, later), join(self.name, earlier), norm_first=True)
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
                yield UnfoldedNorm(join(self.name, norm), join(self.name, conv), self.error)


def _others(default: Any) -> list[Any]:
    """Other values of an argument that has this default."""
    if default is None:
        return [True, False]
    if isinstance(default, (int, float)):
        return [default + 1, default - 1, type(default)(0)]
    return [""] if isinstance(default, str) else []


def _mode(training: bool) -> str:
    return "training" if training else "eval"
