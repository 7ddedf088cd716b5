"""Forwards that run with call quantizers: which call is which, and what its operands and result are rounded by.

A `TorchFunctionMode` looks at each function while the outermost of them runs, and hands those that the innermost one
calls itself to its `RunningForward`. Calls in modules below do not count: every module below notes that it runs by a
pair of hooks. `lq.attachment.interception` puts all that on a module.
"""

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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

#: Runs a call of a module: given the module, the names of its calls, and what computes the result; given a number, that
#: of the first so many samples, where they lie along the first dimension of all that is multiplied.
Watch = Callable[[nn.Module, tuple[str, ...], Callable[..., Any]], Any]

_ATTENTION_SLOTS = {"query": (0, "left"), "key": (0, "right"), "probabilities": (1, "left"), "value": (1, "right")}


class CallQuantizers(nn.ModuleDict):
    """Quantizers of the operands and results of a module's own calls, by ``<kind>_<index>_<operand>``."""

    #: Where in the code each call of the module stands, by call; None: not known yet. See `lq.structure.places`.
    places: Places | None = None

    def __init__(self) -> None:
        super().__init__()
        #: Calls that ran and are none of `places`; they stay float.
        self.unknown: set[str] = set()


class RunningForward:
    """One running forward of a module with call quantizers.

    Args:
        module: the module.
        calls: its call quantizers.
        prefix: where the code that runs was called from, if not directly by the forward.
    """

    def __init__(self, module: nn.Module, calls: CallQuantizers, prefix: str = "") -> None:
        self.module = module
        self.calls = calls
        self.quantizers: dict[str, Any] = self.calls._modules
        self.prefix = prefix
        self.below = 0  # how many modules below are running
        # Branches of torch's own modules are ways to compute the same.
        self.by_place = not torch.compiler.is_compiling() and not _is_torchs(type(module))
        self.order = CallOrder(self.calls.places if self.by_place else None)

    def again(self, prefix: str) -> "RunningForward":
        """One that goes on from here, for code that runs again later."""
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
        """The result of a function that the module calls, by its rounded operands, or rounded itself."""
        if name == MULTI_HEAD:
            with MODE:
                return multi_head_attention(*args, **kwargs)
        if name == ATTENTION:
            return self._attention(function, args, kwargs)
        if name in RESULTS:
            return self._result(function, RESULTS[name], args, kwargs)
        return self._product(function, name, args, kwargs)

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

    def _product(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call.of(name, args, kwargs)
        key = f"{call.kind}_{self.next(call.kind)}"

        def compute(samples: int | None = None) -> Any:
            return self._multiplied(function, Call.of(name, *_first(samples, args, kwargs)), key)

        result = self._multiplied(function, call, key) if RUNNING.watch is None else self._watched((key,), compute)
        self._note_work(key, lambda: call.macs(result))
        return result

    def _watched(self, keys: tuple[str, ...], compute: Callable[..., Any]) -> Any:
        """The result of a call, or of the calls that a function is made of, in the hands of who watches them."""
        watch = RUNNING.watch
        known = any(call_of(name) in keys for name in self.quantizers)
        return watch(self.module, keys, compute) if watch is not None and known else compute()

    def _multiplied(self, function: Any, call: Call, key: str) -> Any:
        """The result of a product, its operands quantized."""
        prefix = f"{key}_"
        for slot in call.places:
            for place in (weight_key(prefix, slot), activation_key(prefix, slot)):
                quantizer = self.quantizers.get(place)
                if quantizer is None:
                    continue
                operand = require_tensor(call.operand(slot), place)
                if isinstance(quantizer, WeightQuantizer):
                    call.replace(slot, quantizer.at_call(operand, call.layout(slot), self.module))
                else:
                    call.replace(slot, quantizer(operand))
        return function(*call.args, **call.kwargs)

    def _note_work(self, call: str, macs: Callable[[], float]) -> None:
        if RUNNING.work:
            key = id(self.quantizers), call
            RUNNING.work[-1][key] = RUNNING.work[-1].get(key, 0.0) + macs()

    def _attention(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first = self.next("matmul", 2)
        quantizers = {}
        if first is not None:
            quantizers = {
                slot: quantizer
                for slot, (product, side) in _ATTENTION_SLOTS.items()
                if (quantizer := self.quantizers.get(f"matmul_{first + product}_{side}")) is not None
            }
        if not quantizers or first is None:
            return function(*args, **kwargs)  # type: ignore[no-any-return]
        if RUNNING.work:
            operands = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            query, key, value = operands["query"], operands["key"], operands["value"]
            scores = float(query.numel() // query.shape[-1] * key.shape[-2])
            self._note_work(f"matmul_{first}", lambda: scores * query.shape[-1])
            self._note_work(f"matmul_{first + 1}", lambda: scores * value.shape[-1])

        def compute(samples: int | None = None) -> Tensor:
            few, named = _first(samples, args, kwargs)
            return attention(
                lambda slot, x: quantizers[slot](x) if slot in quantizers else x,
                "probabilities" not in quantizers,
                *few,
                **named,
            )

        if RUNNING.watch is None:
            return compute()
        return self._watched((f"matmul_{first}", f"matmul_{first + 1}"), compute)  # type: ignore[no-any-return]


def _first(
    samples: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first samples of what a function is called with, if its tensors have them along their first dimension."""
    if samples is None:  # without a look at sizes, which may be unknown while a program is exported
        return args, kwargs
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 2]
    sizes = {len(t) for t in tensors} - {1}
    if len(tensors) < 2 or len(sizes) != 1:
        return args, kwargs
    (size,) = sizes

    def cut(value: Any) -> Any:
        return value[:samples] if isinstance(value, Tensor) and value.ndim > 2 and len(value) == size else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


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
    return by_name or kwargs.get("inplace") is True or any(arg is True for arg in args[1:])


class _Interception(TorchFunctionMode):
    """Hands the calls that the innermost running module makes to its `RunningForward`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        forwards = RUNNING.forwards
        running = forwards[-1] if forwards else None
        if running is None or running.below or not (name in FUNCTIONS or name in _OTHERS):
            return func(*args, **(kwargs or {}))
        return running.run(func, name, args, kwargs or {})


class _Running(threading.local):
    """What runs in this thread: forwards, innermost last, who counts their work, and who watches their calls."""

    def __init__(self) -> None:
        self.forwards: list[RunningForward] = []
        self.watch: Watch | None = None
        self.work: list[dict[tuple[int, str], float]] = []


_OTHERS = {*RESULTS, ATTENTION, MULTI_HEAD}
RUNNING = _Running()
MODE = _Interception()


def quantized_forward(module: nn.Module, original: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with call quantizers; `original` is one that was set on the module itself."""
    forward = partial(type(module).forward, module) if original is None else original
    forwards = RUNNING.forwards
    outermost = not forwards
    running = RunningForward(module, module._modules[CALLS])  # type: ignore[arg-type]
    forwards.append(running)
    try:
        if outermost:
            with MODE:
                result = forward(*args, **kwargs)
        else:
            result = forward(*args, **kwargs)
        running.finish()
        return result
    finally:
        forwards.pop()


@carried_into_recomputation
def _in_these_forwards(function: Callable[..., Any], recomputes: bool) -> Callable[..., Any]:
    """`function`, which runs in the forwards of now when it is computed again."""
    if not RUNNING.forwards:
        return function
    place = place_in_code(RUNNING.forwards[-1].prefix)
    forwards = [running.again(place) for running in RUNNING.forwards]
    first = not recomputes

    def recomputed_part(*args: Any, **kwargs: Any) -> Any:
        outside, RUNNING.forwards = RUNNING.forwards, [running.again(running.prefix) for running in forwards]
        try:
            with MODE:
                return function(*args, **kwargs)
        finally:
            RUNNING.forwards = outside

    def part(*args: Any, **kwargs: Any) -> Any:  # has another name than what `lq.structure.places` ends places at
        nonlocal first
        if first:
            first = False
            return function(*args, **kwargs)
        return recomputed_part(*args, **kwargs)

    return part


def enter(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of modules below: what they call is not the calls of the one that runs."""
    if RUNNING.forwards:
        RUNNING.forwards[-1].below += 1


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of modules below: the one that runs goes on."""
    if RUNNING.forwards:
        RUNNING.forwards[-1].below -= 1
