"""Units of reconstruction: which modules are fitted together, for any model.

One dry run of the float model (`lq.structure.tracing`) says what is called once, with one tensor in and one out. Of
that:

- a *layer* is a module with a quantized weight, and the activation function behind it if nothing else reads between;
- a *block* is what the model itself says it is (timm's ``group_matcher``), or the innermost module that adds what it
  was given to what it made of it (a residual sum); layers outside of blocks are units of their own;
- the *network* is the innermost module that holds all quantized layers.

Source: layers as in AdaRound (activation function included), blocks as in BRECQ, whose code lists classes instead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from lq.errors import PatternError, SpecError, StateError
from lq.reconstruction.quantized_model import QuantizedModel
from lq.structure.calls import ACTIVATIONS
from lq.structure.tracing import CallEvent, Trace, Value, trace

Granularity = Literal["layer", "block", "network"]


@dataclass(frozen=True)
class Unit:
    """Modules that run one after the other, each on the output of the one before.

    Args:
        modules: their names in the model.
        is_block: whether it is a block, not a single layer.
    """

    modules: tuple[str, ...]
    is_block: bool = False

    @property
    def name(self) -> str:
        """The names, for messages and files."""
        return "+".join(self.modules) or "(network)"

    def bind(self, model: nn.Module) -> list[nn.Module]:
        """The modules themselves."""
        return [model.get_submodule(name) for name in self.modules]


def find_units(
    model: QuantizedModel,
    float_model: nn.Module,
    units: Granularity | Sequence[str | Sequence[str]],
    forward: Callable[[], Any],
    example: Any,
) -> list[Unit]:
    """Cut `model` into units, in the order they run.

    Args:
        model: a model with quantizers.
        float_model: its float copy.
        units: "layer", "block" or "network"; or names of modules, chains of them as lists.
        forward: runs `float_model` on `example`.
        example: a batch.

    Raises:
        SpecError: for an unknown granularity.
        PatternError: for a name that the model does not have, or a module that cannot be a unit.
        StateError: if no unit is found.
    """
    kind = type(model.model).__name__
    if not model.weighted:
        raise StateError(
            f"{kind} has no layer with a quantized weight, so that there is nothing to reconstruct; "
            "give Quantize or lq.attach a width for weights"
        )
    finder = _Finder(float_model, trace(float_model, forward, example), model.weighted)
    if units == "network":
        return [finder.network(model.network)]
    if not isinstance(units, str):
        return finder.named(units)
    if units not in get_args(Granularity):
        raise SpecError(f"units={units!r} is unknown; use one of {get_args(Granularity)}, or a list of module names")
    in_order = finder.in_order([*(finder.blocks() if units == "block" else []), *finder.layers()])
    if not in_order:
        raise StateError(f"no layer of {kind} runs once in a forward: there is no unit to reconstruct")
    return in_order


class _Finder:
    """Finds units in the trace of a dry run."""

    def __init__(self, model: nn.Module, trace: Trace, quantized: Sequence[str]) -> None:
        self.model = model
        self.trace = trace
        self.quantized = quantized
        self.order = {name: position for position, name in enumerate(trace.inputs)}
        self.modules = dict(model.named_modules())

    def in_order(self, candidates: Sequence[Unit]) -> list[Unit]:
        """Candidates that no earlier candidate covers, in the order they run."""
        chosen: list[Unit] = []
        taken: set[str] = set()
        for unit in candidates:
            layers = {name for module in unit.modules for name in self.inside(module)}
            if layers and not layers & taken:
                chosen.append(unit)
                taken |= layers
        return sorted(chosen, key=lambda unit: self.order[unit.modules[0]])

    def inside(self, name: str) -> list[str]:
        """Quantized layers in the module `name`."""
        return [layer for layer in self.quantized if layer == name or layer.startswith(f"{name}.")]

    def runs_once(self, name: str) -> bool:
        """Whether the module is called once, with a tensor, and returns one."""
        outputs = self.trace.outputs.get(name, [])
        return len(self.trace.inputs.get(name, [])) == 1 and len(outputs) == 1 and outputs[0] is not None

    def network(self, name: str) -> Unit:
        """The module of that name, or the innermost around it that runs as a whole."""
        while name and not self.runs_once(name):
            name = name.rpartition(".")[0]
        if not self.runs_once(name):
            raise StateError(
                "no module around all quantized layers takes and returns one tensor: the network cannot be one unit; "
                "use units='block', or name modules"
            )
        return Unit((name,))

    def named(self, units: Sequence[str | Sequence[str]]) -> list[Unit]:
        """Units that were given by name."""
        named = [Unit((unit,)) if isinstance(unit, str) else Unit(tuple(unit)) for unit in units]
        if not named or not all(unit.modules for unit in named):
            raise PatternError(f"units: {units!r} has no module, or an empty chain; give at least one name")
        for name in (name for unit in named for name in unit.modules):
            if name not in self.modules:
                raise PatternError(f"units: {name!r} is no module of {type(self.model).__name__}")
            if not self.runs_once(name):
                raise PatternError(f"units: {name!r} is not called exactly once with one tensor in and one out")
        for first, second in (pair for unit in named for pair in zip(unit.modules, unit.modules[1:], strict=False)):
            if first == second or self.trace.inputs[second] != [self.trace.outputs[first][0]]:
                raise PatternError(
                    f"units: {first!r} and {second!r} do not chain: the one's output is not the other's input"
                )
        chosen = self.in_order(named)
        if len(chosen) != len(named):
            left = next(unit for unit in named if unit not in chosen)
            raise PatternError(f"units: {left.name!r} has no quantized layer, or one that another unit has already")
        return chosen

    # --- layers -------------------------------------------------------------------------------------------------

    def layers(self) -> Iterator[Unit]:
        """Each quantized layer, with the activation function that alone reads its output."""
        for name in self.quantized:
            if not self.runs_once(name):
                continue
            modules, value = [name], self.trace.outputs[name][0]
            while value is not None and (after := self._function_of(value, modules)) is not None:
                modules.append(after)
                value = self.trace.outputs[after][0]
            while not self._computes(modules[-1]):
                modules.pop()  # identities behind it
            yield Unit(tuple(modules))

    def _function_of(self, value: Value, before: Sequence[str]) -> str | None:
        """The module without weights that alone reads `value`, if it is an activation function or changes nothing."""
        if len(value.readers) > 1:
            return None
        for name, inputs in self.trace.inputs.items():
            if inputs != [value] or name in before or not self.runs_once(name) or any(self.modules[name].children()):
                continue
            if self.trace.outputs[name] == [value] or (self._is_activation(name) and value.readers):
                return name
        return None

    def _is_activation(self, name: str) -> bool:
        return any(event.module == name and event.kind in _ACTIVATIONS for event in self.trace.calls)

    def _computes(self, name: str) -> bool:
        return self.trace.outputs[name] != self.trace.inputs[name]

    # --- blocks -------------------------------------------------------------------------------------------------

    def blocks(self) -> list[Unit]:
        """Blocks that the model names, then those with a residual sum, innermost first."""
        residual = {event.module for event in self.trace.calls if event.module and self._is_residual(event)}
        names = [*self._groups(), *sorted(residual, key=lambda name: -name.count("."))]
        everything = len(self.quantized)
        parts = [name for name in names if name not in self.quantized and self.runs_once(name)]
        return [Unit((name,), is_block=True) for name in parts if len(self.inside(name)) < everything]

    def _groups(self) -> list[str]:
        """Modules that hold just the parameters of one of timm's groups."""
        groups: list[str] = []
        for prefix, module in self.modules.items():
            matcher = getattr(module, "group_matcher", None)
            if not callable(matcher):
                continue
            from timm.models import group_parameters

            for parameters in group_parameters(module, matcher(coarse=False)).values():
                groups += [f"{prefix}.{name}".lstrip(".") for name in _holders(module, set(parameters))]
        return groups

    def _is_residual(self, event: CallEvent) -> bool:
        """Whether a call adds what its module was given, or what a part of it made of that alone, to something else."""
        both = [value for value in event.operands.values() if value.varies]
        inputs = self.trace.inputs.get(event.module or "", [])
        if event.kind != "add" or len(both) != 2 or both[0] is both[1] or len(inputs) != 1:
            return False
        if any(math.prod(value.shape) != math.prod(event.result.shape) for value in both):
            return False
        return any(value is inputs[0] or self._is_shortcut(value, inputs[0], event.module or "") for value in both)

    def _is_shortcut(self, value: Value, read: Value, module: str) -> bool:
        """Whether `value` is the output of a child that reads `read`, the shortcut of a block that changes shape."""
        return any(
            name.rpartition(".")[0] == module and self.trace.inputs.get(name) == [read] for name in value.output_of
        )


def _holders(model: nn.Module, parameters: set[str]) -> list[str]:
    """The largest modules of `model` all of whose parameters are among `parameters`; not what only wraps another."""
    holders: list[str] = []
    for name, module in model.named_modules():  # outer ones come first
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        wraps = any(
            {f"{name}.{child}.{p}" for p, _ in part.named_parameters()} == own
            for child, part in module.named_children()
        )
        taken = any(name.startswith(f"{outer}.") for outer in holders)
        if name and own and own <= parameters and not wraps and not taken:
            holders.append(name)
    return holders


_ACTIVATIONS = set(ACTIVATIONS.values())
