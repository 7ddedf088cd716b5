"""Quantizers inside a module's forward: at operands and results of the functions it calls itself.

`attach` gives such a module a submodule ``call_quantizers``, whose children are named by call and operand
(``matmul_0_left``), and a ``forward`` that runs the original one while a `TorchFunctionMode` looks at each function.
Calls in modules below do not count: every module below notes that it runs by a pair of hooks. Nothing of the module's
code is read or changed, so that control flow is no obstacle; calls that are not reached keep their quantizers unused.
"""

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq.quantizer.quantizer import PARTS, ActivationQuantizer, Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.calls import (
    ATTENTION,
    FUNCTIONS,
    MULTI_HEAD,
    RESULTS,
    Call,
    attention,
    multi_head_attention,
    require_tensor,
)
from lq.structure.places import CallOrder, Places, call_of, line_in_code, place_in_code
from lq.structure.recomputation import carried_into_recomputation
from lq.structure.site import activation_key, weight_key

#: Attribute of a module that holds the quantizers of its calls.
CALLS = "call_quantizers"

_ATTENTION_SLOTS = {"query": (0, "left"), "key": (0, "right"), "probabilities": (1, "left"), "value": (1, "right")}


class CallQuantizers(nn.ModuleDict):
    """Quantizers of the operands and results of a module's own calls, by ``<kind>_<index>_<operand>``."""

    #: Where in the code each call of the module stands, by call; None: not known yet. See `lq.structure.places`.
    places: Places | None = None

    def __init__(self) -> None:
        super().__init__()
        #: Calls that ran and are none of `places`; they stay float.
        self.unknown: set[str] = set()


class _Frame:
    """One running forward of a module with call quantizers.

    Args:
        module: the module.
        prefix: where the code that runs was called from, if not directly by the forward.
    """

    def __init__(self, module: nn.Module, prefix: str = "") -> None:
        self.module = module
        self.calls: CallQuantizers = module._modules[CALLS]  # type: ignore[assignment]
        self.quantizers: dict[str, Any] = self.calls._modules
        self.prefix = prefix
        self.below = 0  # how many modules below are running
        # Branches of torch's own modules are ways to compute the same.
        self.by_place = not torch.compiler.is_compiling() and not _is_torchs(type(module))
        self.order = CallOrder(self.calls.places if self.by_place else None)

    def again(self, prefix: str) -> "_Frame":
        """A frame that goes on from here, for code that runs again later."""
        copied = copy.copy(self)
        copied.order, copied.prefix = self.order.copy(), prefix
        return copied

    def next(self, kind: str, calls: int = 1) -> int | None:
        """Number of the call that runs now; of the first of `calls`. None: it is not one of those that are known."""
        if not self.by_place:
            return self.order.by_count(kind, calls)
        place = place_in_code(self.prefix)
        index = self.order.next(kind, place, calls)
        if index is None:
            self._tell(kind)
        return index

    def finish(self) -> None:
        """Take the places of this run's calls for those of all runs, if it had all that there are quantizers for."""
        if self.calls.places is None and self.by_place:
            reached = {f"{kind}_{number}" for kind, number, _ in self.order.calls}
            if all(call_of(slot) in reached for slot in self.quantizers):
                self.calls.places = Places()
                self.calls.places.add_run(self.order.calls)

    def _tell(self, kind: str) -> None:
        call = f"{kind} in {line_in_code()}"
        if call in self.calls.unknown or not any(name.startswith(f"{kind}_") for name in self.quantizers):
            return
        self.calls.unknown.add(call)
        warnings.warn(
            f"{type(self.module).__name__} calls {call}, which it did not do in the run that quantizers were placed by "
            "(another branch, a longer loop): the call stays float. To quantize it, give lq.inspect (or the module's "
            "example_input_array) an example that takes this path",
            UserWarning,
            stacklevel=2,
        )

    def run(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == MULTI_HEAD:
            with _MODE:
                return multi_head_attention(*args, **kwargs)
        if name == ATTENTION:
            return self._attention(function, args, kwargs)
        if name in RESULTS:
            return self._result(function, RESULTS[name], args, kwargs)
        return self._product(function, Call.of(name, args, kwargs))

    def _result(self, function: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return function(*args, **kwargs)
        quantizer = self.quantizers.get(f"{kind}_{self.next(kind)}_output")
        if quantizer is None:
            return function(*args, **kwargs)
        if isinstance(out := kwargs.get("out"), Tensor):
            return rounded_in_place(quantizer, out, lambda _: function(*args, **kwargs))
        if not args or not _works_in_place(function, args, kwargs):
            return quantizer(function(*args, **kwargs))
        return rounded_in_place(quantizer, first, lambda copied: function(copied, *args[1:], **kwargs))

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
        if _RUNNING.work:
            key = id(self.quantizers), call
            _RUNNING.work[-1][key] = _RUNNING.work[-1].get(key, 0.0) + macs()

    def _attention(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first = self.next("matmul", 2)
        found = {}
        if first is not None:
            found = {
                slot: quantizer
                for slot, (product, side) in _ATTENTION_SLOTS.items()
                if (quantizer := self.quantizers.get(f"matmul_{first + product}_{side}")) is not None
            }
        if not found or first is None:
            return function(*args, **kwargs)  # type: ignore[no-any-return]
        if _RUNNING.work:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            query, key, value = given["query"], given["key"], given["value"]
            scores = float(query.numel() // query.shape[-1] * key.shape[-2])
            self._note_work(f"matmul_{first}", lambda: scores * query.shape[-1])
            self._note_work(f"matmul_{first + 1}", lambda: scores * value.shape[-1])
        return attention(
            lambda slot, x: found[slot](x) if slot in found else x, "probabilities" not in found, *args, **kwargs
        )


def _is_torchs(kind: type[nn.Module]) -> bool:
    return kind.forward.__module__.startswith("torch.nn.")


def rounded_in_place(quantizer: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The rounded result of a function that works in place, written where it would be.

    Code that works in place need not assign the result: what it reads next is the tensor that was changed.

    Args:
        quantizer: rounds the result.
        x: what the function changes.
        function: changes what it is given. It may need its result in backward, so that it gets a copy of `x`.
    """
    result = function(x.clone() if torch.is_grad_enabled() else x)
    rounded: Tensor = quantizer(result)
    return x if rounded is x else x.copy_(rounded)


def _works_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = function.__name__
    by_name = name.startswith("__i") if name.startswith("__") else name.endswith("_")
    return by_name or kwargs.get("inplace") is True or any(given is True for given in args[1:])


class _Interception(TorchFunctionMode):
    """Hands the calls of the innermost running module to its frame."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        frames = _RUNNING.frames
        frame = frames[-1] if frames else None
        if frame is None or frame.below or not (name in FUNCTIONS or name in _OTHERS):
            return func(*args, **(kwargs or {}))
        return frame.run(func, name, args, kwargs or {})


class _Running(threading.local):
    """What runs in this thread: frames, innermost last, and who counts their work."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.work: list[dict[tuple[int, str], float]] = []


_OTHERS = {*RESULTS, ATTENTION, MULTI_HEAD}
_RUNNING = _Running()
_MODE = _Interception()


def quantized_forward(module: nn.Module, original: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with call quantizers; `original` is one that was set on the module itself."""
    forward = partial(type(module).forward, module) if original is None else original
    frames = _RUNNING.frames
    outermost = not frames
    frame = _Frame(module)
    frames.append(frame)
    try:
        if outermost:
            with _MODE:
                result = forward(*args, **kwargs)
        else:
            result = forward(*args, **kwargs)
        frame.finish()
        return result
    finally:
        frames.pop()


@carried_into_recomputation
def _in_these_frames(function: Callable[..., Any], recomputes: bool) -> Callable[..., Any]:
    """`function`, which runs in the frames of now when it is computed again."""
    if not _RUNNING.frames:
        return function
    place = place_in_code(_RUNNING.frames[-1].prefix)
    frames = [frame.again(place) for frame in _RUNNING.frames]
    first = not recomputes

    def recomputed_part(*args: Any, **kwargs: Any) -> Any:
        outside, _RUNNING.frames = _RUNNING.frames, [frame.again(frame.prefix) for frame in frames]
        try:
            with _MODE:
                return function(*args, **kwargs)
        finally:
            _RUNNING.frames = outside

    def part(*args: Any, **kwargs: Any) -> Any:  # has another name than what `lq.structure.places` ends places at
        nonlocal first
        if first:
            first = False
            return function(*args, **kwargs)
        return recomputed_part(*args, **kwargs)

    return part


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[dict[str, float]]:
    """Multiply-accumulates of the calls that have quantizers, by module and call; filled when the context ends."""
    macs: dict[str, float] = {}
    _RUNNING.work.append({})
    try:
        yield macs
    finally:
        counted = _RUNNING.work.pop()
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
        module._replicate_for_data_parallel = partial(_replica, module)  # type: ignore[method-assign]
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
            del module._replicate_for_data_parallel
            original = module.__dict__.pop("forward").args[1]
            if original is not None:
                module.forward = original
        for hooks, function in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _replica(module: nn.Module) -> nn.Module:
    """A copy for another device, as `nn.DataParallel` makes them: it runs its own forward, with its own quantizers."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    replica.forward = partial(quantized_forward, replica, module.forward.args[1])  # type: ignore[attr-defined]
    return replica


def _hooked(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _enter(module: nn.Module, args: Any) -> None:
    if _RUNNING.frames:
        _RUNNING.frames[-1].below += 1


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _RUNNING.frames:
        _RUNNING.frames[-1].below -= 1


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
        """Quantize `x` as the owner does, on the device of `x`: replicas of a model have the owner of the original."""
        owner = self.owner
        if owner.log2_step.device != x.device:
            owner = copy.copy(owner)
            owner.__dict__.update({part: getattr(self.owner, part).to(x.device) for part in PARTS})
            owner._parameters, owner._buffers = {}, {}
        return owner.forward(x)

    def get_extra_state(self) -> Tensor:
        """The path, in a form that every checkpoint format can hold."""
        return torch.tensor(list(self.path.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the owner has the state."""

    def extra_repr(self) -> str:
        """Where the quantizer is."""
        return self.path
