"""A dry run: which tensors flow where, as the model runs once on an example.

A `TorchFunctionMode` sees every torch function, a pair of hooks every module. Each tensor gets a `Value`; views, copies
and reorderings keep the value of what they show, so that "the same tensor" means the same numbers wherever they go.
Nothing is traced symbolically: code with any control flow can be looked at, for the path the example takes.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from lq.structure.calls import ATTENTION, FUNCTIONS, MULTI_HEAD, RESULTS, Call, multi_head_attention
from lq.structure.channels import ChannelLayout
from lq.structure.places import FUSED, place_in_code
from lq.structure.sources import Parameters, Source

#: Functions whose result holds all numbers of their first argument, and no others.
_SAME = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "contiguous", "clone", "squeeze",
    "unsqueeze", "movedim", "moveaxis", "swapaxes", "swapdims", "expand", "expand_as", "detach", "roll", "flip",
    "view_as", "reshape_as", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "dropout", "dropout_",
    "dropout2d", "alpha_dropout", "to", "float", "requires_grad_", "rot90", "alias", "ravel", "adjoint", "cpu",
    "type", "type_as",
}  # fmt: skip
#: Functions whose result holds some numbers of their arguments, and zeros.
_SOME = {
    "__getitem__", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select", "gather",
    "max_pool1d", "max_pool2d", "max_pool3d", "_max_pool2d", "pad", "repeat", "repeat_interleave", "tile", "unfold",
    "take_along_dim", "split_with_sizes", "hsplit", "vsplit", "diagonal",
}  # fmt: skip
_CONCAT = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
#: Functions that ask about a tensor and do not read its numbers.
_QUERIES = {
    "__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "type", "__len__",
    "ndimension", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_tensor",
}  # fmt: skip

Origin = Literal["input", "parameter", "constant", "activation"]


@dataclass(eq=False)
class Value:
    """The numbers of one tensor.

    Args:
        index: position in the order of appearance.
        shape: shape of the tensor that first had them.
        origin: what they depend on; "constant" is computed from parameters and buffers alone.
        parameter: name of the parameter or buffer, if they are one's.
        within: the value that they are a selection of.
        parts: the values they are a concatenation of.
        is_complex: they are complex numbers.
        function: name of the function that gave them; "": a parameter, an input, or another way.
    """

    index: int
    shape: tuple[int, ...]
    origin: Origin
    parameter: str | None = None
    within: "Value | None" = None
    parts: tuple["Value", ...] = ()
    is_complex: bool = False
    function: str = ""
    readers: list[str] = field(default_factory=list)
    made_by: "CallEvent | None" = None
    output_of: list[str] = field(default_factory=list)

    @property
    def varies(self) -> bool:
        """Whether the numbers depend on the model's input."""
        return self.origin in ("input", "activation")


@dataclass(eq=False)
class CallEvent:
    """One functional call: in the forward of which module, and on which values."""

    module: str | None
    kind: str
    index: int
    function: str
    operands: dict[str, Value]
    whole: dict[str, bool]  # the operand is the parameter itself, not a view of it
    layouts: dict[str, ChannelLayout]
    result: Value
    macs: float
    place: str = ""  # in the code of the module (`lq.structure.places`)
    run: int = 0  # of the module, as it may be called several times
    sources: dict[str, Source] = field(default_factory=dict)  # of operands that are parts of parameters

    @property
    def name(self) -> str:
        """Name of the call in its module."""
        return f"{self.kind}_{self.index}"


@dataclass(frozen=True)
class Argument:
    """A tensor that a function was given.

    Args:
        value: its numbers.
        ndim: how many dimensions it has.
        whole: it is a parameter itself, not a view of one.
    """

    value: Value
    ndim: int
    whole: bool


@dataclass(eq=False)
class Step:
    """One function that computed something: in the forward of which module, of what, and what it made.

    Args:
        module: name of the module.
        function: name of the function.
        args: its positional arguments; of tensors, an `Argument`.
        kwargs: the same for those by keyword.
        results: the values it made or changed.
    """

    module: str | None
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value, ...]

    @property
    def given(self) -> list[Argument]:
        """The tensors among its arguments."""
        return [part for part in tree_leaves((self.args, self.kwargs)) if isinstance(part, Argument)]

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """One of its arguments."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(keyword, default)


@dataclass
class Trace:
    """What a dry run saw; steps are functions that make new numbers, not views, copies and reorderings."""

    calls: list[CallEvent] = field(default_factory=list)
    inputs: dict[str, list[Value]] = field(default_factory=dict)
    outputs: dict[str, list[Value | None]] = field(default_factory=dict)
    concats: list[Value] = field(default_factory=list)
    uses: dict[str, set[str]] = field(default_factory=dict)
    reads: Counter[str] = field(default_factory=Counter)  # how often the memory of a parameter is read
    values: list[Value] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def trace(model: nn.Module, forward: Callable[[], Any], example: Any) -> Trace:
    """Run `forward`, which runs `model` on `example`, and note what happens."""
    recorder = _Recorder(model, example)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(module.register_forward_pre_hook(recorder.entered(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(recorder.left(name), always_call=True))
    try:
        with recorder:
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    recorder.trace.results = [recorder.value(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
    return recorder.trace


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.trace = Trace()
        self.values: Any = WeakIdKeyDictionary()
        self.running: list[tuple[str, Counter[str]]] = []
        self.runs: list[Counter[str]] = []
        self.parameters = Parameters(model.named_parameters())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.values[tensor] = self._new(tensor, "parameter", parameter=name)
        for tensor in tree_leaves(example):
            if isinstance(tensor, Tensor):
                self.values[tensor] = self._new(tensor, "input")

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one that no torch function was seen to make is an activation."""
        if tensor not in self.values:
            self.values[tensor] = self._new(tensor, "activation" if tensor.is_floating_point() else "constant")
        return self.values[tensor]  # type: ignore[no-any-return]

    def entered(self, name: str) -> Callable[..., None]:
        """Pre-hook of the module `name`."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor):
                self.trace.inputs.setdefault(name, []).append(self.value(given))
            self.runs.append(Counter())
            self.running.append((name, self.runs[-1]))

        return hook

    def left(self, name: str) -> Callable[..., None]:
        """Hook of the module `name`."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while self.running and self.running.pop()[0] != name:
                pass
            value = self.value(output) if isinstance(output, Tensor) else None
            self.trace.outputs.setdefault(name, []).append(value)
            if value is not None:
                value.output_of.append(name)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == MULTI_HEAD:
            with self:
                return multi_head_attention(*args, **kwargs)
        read = {key: value for key, value in kwargs.items() if key != "out"}
        given = [t for t in tree_leaves((args, read)) if isinstance(t, Tensor)]
        values = [self.value(t) for t in given]
        versions = [None if t.is_inference() else t._version for t in given]
        result = func(*args, **kwargs)
        if name in _QUERIES and not isinstance(result, Tensor):
            return result
        changed = [v is not None and t._version != v for t, v in zip(given, versions, strict=True)]
        self._note_reads(given, result)
        self._note_uses(name, args, kwargs, given, values)
        held: tuple[Any, Any] = tree_map_only(Tensor, self._argument, (args, kwargs))
        made = self._results(name, args, kwargs, given, values, result, changed)
        if name not in _QUERIES and not (name in _SAME and made in values):
            self._note_step(name, held, [t for t, c in zip(given, changed, strict=True) if c], result)
        if name in FUNCTIONS:
            self._product(name, args, kwargs, result, made)
        elif name == ATTENTION:
            self._attention(given, values, result, made)
        elif name in RESULTS and isinstance(result, Tensor) and result.is_floating_point():
            self._add_event(RESULTS[name], name, dict(enumerate(values)), made, 0.0)
        return result

    def _argument(self, tensor: Tensor) -> Argument:
        return Argument(self.value(tensor), tensor.ndim, isinstance(tensor, nn.Parameter))

    def _note_step(self, name: str, held: tuple[Any, Any], changed: list[Tensor], result: Any) -> None:
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        results = tuple({id(v): v for v in map(self.value, [*made, *changed])}.values())
        module = self.running[-1][0] if self.running else None
        self.trace.steps.append(Step(module, name, held[0], held[1], results))

    def _note_uses(self, name: str, args: Any, kwargs: Any, given: list[Tensor], values: list[Value]) -> None:
        same = name in _SAME
        for value in values:
            if value.parameter is not None and not same:
                use = name
                bias = args[2] if len(args) > 2 and name in FUNCTIONS else kwargs.get("bias")
                if isinstance(bias, Tensor) and self.value(bias) is value:
                    use = "bias"
                self.trace.uses.setdefault(value.parameter, set()).add(use)
        if not same and name not in _QUERIES:
            for value in {id(v): v for v in values}.values():
                value.readers.append(name)

    def _note_reads(self, given: list[Tensor], result: Any) -> None:
        """Count what reads the numbers of a parameter: all that returns anything but views of it."""
        made = [found and found[0] for t in tree_leaves(result) if isinstance(t, Tensor) for found in [self._memory(t)]]
        for name in {id(t): found[0] for t in given if (found := self._memory(t)) is not None}.values():
            if not made or any(other != name for other in made):
                self.trace.reads[name] += 1

    def _memory(self, tensor: Tensor) -> tuple[str, nn.Parameter] | None:
        return self.parameters.find(tensor) if tensor.is_floating_point() else None

    def _results(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        values: list[Value],
        result: Any,
        changed: list[bool],
    ) -> Value:
        """Give values to the results of a function; return that of the first."""
        varies = any(value.varies for value in values)
        origin: Origin = "activation" if varies else "constant"
        first: Value | None = None
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            if any(tensor is t for t, c in zip(given, changed, strict=False) if not c):
                found = self.value(tensor)
            elif (
                values
                and name in _SAME
                and not any(changed)
                and tensor.is_floating_point() == given[0].is_floating_point()
            ):
                found = values[0]
            elif values and (name in _SOME or (name == "interpolate" and kwargs.get("mode", "nearest") == "nearest")):
                found = self._new(tensor, origin, within=values[0])
            elif name in _CONCAT:
                found = self._new(tensor, origin, parts=tuple(values))
                self.trace.concats.append(found)
            else:
                found = self._new(tensor, origin, function=name)
            self.values[tensor] = found
            first = first or found
        for tensor, was_changed in zip(given, changed, strict=False):
            if was_changed and not any(tensor is r for r in tree_leaves(result)):
                self.values[tensor] = self._new(tensor, origin)
        if first is None:
            first = Value(-1, (), origin)
        return first

    def _product(self, name: str, args: Any, kwargs: Any, result: Any, made: Value) -> None:
        call = Call.of(name, args, kwargs)
        slots = {slot: t for slot in call.places if isinstance(t := call.operand(slot), Tensor)}
        event = self._add_event(call.kind, name, {s: self.value(t) for s, t in slots.items()}, made, call.macs(result))
        event.whole = {s: isinstance(t, nn.Parameter) for s, t in slots.items()}
        event.layouts = {s: call.layout(s) for s, t in slots.items() if s != "input" and t.ndim > 1}
        for slot, layout in event.layouts.items():
            if (found := self._memory(slots[slot])) is not None:
                source = Source.of(*found, slots[slot], layout)
                event.sources |= {} if source is None else {slot: source}

    def _attention(self, given: list[Tensor], values: list[Value], result: Tensor, made: Value) -> None:
        query, key, value = given[:3]
        scores = (*result.shape[:-1], key.shape[-2])
        varies: Origin = "activation" if any(v.varies for v in values[:2]) else "constant"
        scaled = self._value(tuple(query.shape), values[0].origin)
        probabilities = self._value(scores, varies, function="softmax")
        count = float(torch.Size(scores).numel())
        first = {"left": scaled, "right": values[1]}
        self._add_event("matmul", ATTENTION, first, probabilities, count * query.shape[-1])
        self._add_event("matmul", ATTENTION, {"left": probabilities, "right": values[2]}, made, count * value.shape[-1])

    def _add_event(self, kind: str, function: str, operands: dict[Any, Value], made: Value, macs: float) -> CallEvent:
        module, counts = self.running[-1] if self.running else (None, Counter[str]())
        place = place_in_code() + (FUSED if function == ATTENTION else "")
        event = CallEvent(module, kind, counts[kind], function, operands, {}, {}, made, macs, place, id(counts))
        counts[kind] += 1
        if made.made_by is None:
            made.made_by = event
        self.trace.calls.append(event)
        return event

    def _new(self, tensor: Tensor, origin: Origin, **more: Any) -> Value:
        return self._value(tuple(tensor.shape), origin, is_complex=tensor.is_complex(), **more)

    def _value(self, shape: tuple[int, ...], origin: Origin, **more: Any) -> Value:
        self.trace.values.append(Value(len(self.trace.values) + 1, shape, origin, **more))
        return self.trace.values[-1]
