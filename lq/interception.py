"""Quantizers inside a module's forward: at operands and results of the functions it calls itself.

`attach` gives such a module a submodule ``call_quantizers``, whose children are named by call and operand
(``matmul_0_left``), and a ``forward`` that runs the original one while a `TorchFunctionMode` looks at each function.
Calls in modules below do not count: every module below notes that it runs by a pair of hooks. Nothing of the module's
code is read or changed, so that control flow is no obstacle; calls that are not reached keep their quantizers unused.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq.calls import ATTENTION, FUNCTIONS, MULTI_HEAD, RESULTS, Call, attention, multi_head_attention, require_tensor
from lq.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer

#: Attribute of a module that holds the quantizers of its calls.
CALLS = "call_quantizers"

_ATTENTION_SLOTS = {"query": (0, "left"), "key": (0, "right"), "probabilities": (1, "left"), "value": (1, "right")}


def weight_key(prefix: str, slot: str) -> str:
    """Name of the quantizer of an operand that is made of parameters alone."""
    return prefix + slot if slot.startswith("weight") else f"{prefix}{slot}_weight"


def activation_key(prefix: str, slot: str) -> str:
    """Name of the quantizer of an operand that depends on the input."""
    return f"{prefix}{slot}_activation" if slot.startswith("weight") else prefix + slot


def is_weight_key(key: str) -> bool:
    """Whether a call's quantizer is one of a weight, by its name."""
    return "_weight" in key and not key.endswith("_activation")


class CallQuantizers(nn.ModuleDict):
    """Quantizers of the operands and results of a module's own calls, by ``<kind>_<index>_<operand>``."""


class _Frame:
    """One running forward of a module with call quantizers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.quantizers: dict[str, nn.Module] = module._modules[CALLS]._modules  # type: ignore[union-attr, assignment]
        self.counts: dict[str, int] = {}
        self.below = 0  # how many modules below are running

    def next(self, kind: str, calls: int = 1) -> int:
        index = self.counts.get(kind, 0)
        self.counts[kind] = index + calls
        return index

    def run(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == MULTI_HEAD:
            with _MODE:
                return multi_head_attention(*args, **kwargs)
        if name == ATTENTION:
            return self._attention(function, args, kwargs)
        if name in RESULTS:
            result = function(*args, **kwargs)
            if not isinstance(result, Tensor) or not result.is_floating_point():
                return result
            kind = RESULTS[name]
            quantizer = self.quantizers.get(f"{kind}_{self.next(kind)}_output")
            return result if quantizer is None else quantizer(result)
        return self._product(function, Call.of(name, args, kwargs))

    def _product(self, function: Any, call: Call) -> Any:
        prefix = f"{call.kind}_{self.next(call.kind)}_"
        for slot in call.places:
            for key in (weight_key(prefix, slot), activation_key(prefix, slot)):
                quantizer = self.quantizers.get(key)
                if quantizer is None:
                    continue
                operand = require_tensor(call.operand(slot), key)
                if isinstance(quantizer, WeightQuantizer):
                    call.replace(slot, quantizer.at_call(operand, call.layout(slot), self.module))
                else:
                    call.replace(slot, quantizer(operand))
        result = function(*call.args, **call.kwargs)
        self._note_work(prefix[:-1], lambda: call.macs(result))
        return result

    def _note_work(self, call: str, macs: Callable[[], float]) -> None:
        if _WORK:
            key = id(self.quantizers), call
            _WORK[-1][key] = _WORK[-1].get(key, 0.0) + macs()

    def _attention(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first = self.next("matmul", 2)
        found = {
            slot: quantizer
            for slot, (product, side) in _ATTENTION_SLOTS.items()
            if (quantizer := self.quantizers.get(f"matmul_{first + product}_{side}")) is not None
        }
        if not found:
            return function(*args, **kwargs)  # type: ignore[no-any-return]
        if _WORK:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            query, key, value = given["query"], given["key"], given["value"]
            scores = float(query.numel() // query.shape[-1] * key.shape[-2])
            self._note_work(f"matmul_{first}", lambda: scores * query.shape[-1])
            self._note_work(f"matmul_{first + 1}", lambda: scores * value.shape[-1])
        return attention(
            lambda slot, x: found[slot](x) if slot in found else x, "probabilities" not in found, *args, **kwargs
        )


class _Interception(TorchFunctionMode):
    """Hands the calls of the innermost running module to its frame."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        frame = _FRAMES[-1] if _FRAMES else None
        if frame is None or frame.below or not (name in FUNCTIONS or name in _OTHERS):
            return func(*args, **(kwargs or {}))
        return frame.run(func, name, args, kwargs or {})


_OTHERS = {*RESULTS, ATTENTION, MULTI_HEAD}
_FRAMES: list[_Frame] = []
_WORK: list[dict[tuple[int, str], float]] = []
_MODE = _Interception()


def quantized_forward(module: nn.Module, original: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with call quantizers; `original` is one that was set on the module itself."""
    forward = partial(type(module).forward, module) if original is None else original
    outermost = not _FRAMES
    _FRAMES.append(_Frame(module))
    try:
        if not outermost:
            return forward(*args, **kwargs)
        with _MODE:
            return forward(*args, **kwargs)
    finally:
        _FRAMES.pop()


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[dict[str, float]]:
    """Multiply-accumulates of the calls that have quantizers, by module and call; filled when the context ends."""
    macs: dict[str, float] = {}
    _WORK.append({})
    try:
        yield macs
    finally:
        counted = _WORK.pop()
        names = {id(m._modules[CALLS]._modules): n for n, m in model.named_modules() if call_quantizers(m)}
        for (key, call), count in counted.items():
            if key in names:
                macs[f"{names[key]}.{call}".lstrip(".")] = count


def call_quantizers(module: nn.Module) -> dict[str, nn.Module]:
    """The quantizers of a module's calls, by call and operand."""
    found = module._modules.get(CALLS)
    return dict(found._modules) if isinstance(found, CallQuantizers) else {}


def add_call_quantizer(module: nn.Module, slot: str, quantizer: nn.Module) -> None:
    """Put a quantizer at an operand or result of a call of `module`."""
    if not isinstance(module._modules.get(CALLS), CallQuantizers):
        below = [m for m in module.modules() if m is not module and not isinstance(m, Quantizer)]
        module.add_module(CALLS, CallQuantizers().train(module.training))
        own = module.__dict__.get("forward")
        module.forward = partial(quantized_forward, module, own)
        module.forward.__signature__ = inspect.signature(own or partial(type(module).forward, module))  # type: ignore[attr-defined]
        for part in below:
            if not isinstance(part, (torch.jit.ScriptModule, CallQuantizers)) and _enter not in _hooked(part):
                part.register_forward_pre_hook(_enter, prepend=True)  # before and after the part's own quantizers
                part.register_forward_hook(_leave, always_call=True)
    module.get_submodule(CALLS).add_module(slot, quantizer)


def remove_call_quantizers(model: nn.Module) -> None:
    """Take all call quantizers off a model, and every trace of them."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(CALLS), CallQuantizers):
            delattr(module, CALLS)
            original = module.__dict__.pop("forward").args[1]
            if original is not None:
                module.forward = original
        for hooks, function in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _hooked(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _enter(module: nn.Module, args: Any) -> None:
    if _FRAMES:
        _FRAMES[-1].below += 1


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _FRAMES:
        _FRAMES[-1].below -= 1


class SharedQuantizer(nn.Module):
    """Stands where a tensor is read again that another site has a quantizer for.

    Args:
        owner: the quantizer of that site.
        path: where it is, from the module that holds this one, as a relative path.
    """

    def __init__(self, owner: ActivationQuantizer, path: str) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, not a submodule: its state is saved once, where it is
        self.path = path

    @property
    def owner(self) -> ActivationQuantizer:
        """The quantizer that is shared."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x` as the owner does."""
        return self.owner.forward(x)

    def get_extra_state(self) -> Tensor:
        """The path, in a form that every checkpoint format can hold."""
        return torch.tensor(list(self.path.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the owner has the state."""

    def extra_repr(self) -> str:
        """Where the quantizer is."""
        return self.path
