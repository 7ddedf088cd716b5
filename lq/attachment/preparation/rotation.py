r"""Rotate the residual stream of an isotropic transformer, exactly, so that no channel of it stands out.

The stream x (of d channels, from the patch embedding to the head) becomes R x, with an orthogonal R of fixed
random entries that leaves the all-ones vector alone, so that layer norms without weight and bias commute with it:
mean and length of R x are those of x. The weight and the bias of each norm are folded into the layers behind it,

    W' = W diag(gamma) R^T,  b' = b + W beta,  gamma' = 1,  beta' = 0,

layers that write to the stream become ``R W`` and ``R b``, tokens and positions ``R p``. After GLF-Q; R is dense, for
it costs nothing once it is folded, where a Hadamard matrix would need a width that one exists for. Computed in float64.

It is no help by itself where weights have few bits and activations many: trained weights fit a grid better than
rotated ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lq.attachment.preparation.following import KEEPING, LAYERS, NORMS, SUMS, RefusedError, Search, name_of
from lq.attachment.preparation.parts import Maker, Pair, Reader
from lq.attachment.preparation.stored import parameter, write
from lq.structure.tracing import Argument, Step, Trace, Value

_SEED = 0
_CONCATENATIONS = {"cat", "concat", "concatenate"}


def rotation(width: int) -> Tensor:
    """The orthogonal matrix R, (d, d) in float64, the same for each d; ``R @ 1 = 1``.

    >>> R = rotation(6)
    >>> bool(((R @ R.T - torch.eye(6)).abs() < 1e-12).all()), bool(((R.sum(1) - 1).abs() < 1e-12).all())
    (True, True)
    """
    generator = torch.Generator().manual_seed(_SEED)
    ones = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    basis, _ = torch.linalg.qr(
        torch.cat([ones, torch.randn(width, width - 1, generator=generator, dtype=torch.float64)], 1)
    )
    inner, _ = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64))
    turned: Tensor = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T
    return turned


@dataclass
class Stream:
    """What reads and writes a residual stream.

    Args:
        width: its number of channels d.
        norms: norms that read it, with the layers behind them.
        writers: layers that write to it.
        readers: layers that read it without a norm.
        tokens: parameters that are added to it or put beside it, with d values along the last dimension.
    """

    width: int
    norms: dict[str, Pair] = field(default_factory=dict)
    writers: dict[str, Maker] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    tokens: dict[str, None] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters that are changed."""
        parts = [(one.weight, one.bias) for one in self.writers.values()]
        parts += [(one.weight, None) for one in self.readers.values()]
        named = {name for both in parts for name in both if name is not None}
        named = named.union(*(pair.parameters for pair in self.norms.values()))
        return sorted(named | set(self.tokens))


def find_stream(model: nn.Module, seen: Trace, pairs: list[Pair], *, frozen: bool) -> Stream | str:
    """The residual stream that norms read in a run of `model`; or why there is none that can be rotated."""
    by_weight = {pair.maker.weight: pair for pair in pairs if pair.kind == "norm"}
    first = next((s for s in seen.steps if s.function in NORMS and _weight(s) in by_weight), None)
    if first is None:
        return "no norm is followed by layers that could take its weight and its bias"
    follower = _Follower(model, seen, by_weight, by_weight[str(_weight(first))].channels, frozen)
    try:
        return follower.follow(first.argument(0, "input"))
    except RefusedError as refused:
        return refused.reason


class _Follower(Search):
    """Follows the stream both ways, to what makes it and to what reads it."""

    def __init__(self, model: nn.Module, seen: Trace, norms: dict[str, Pair], width: int, frozen: bool) -> None:
        super().__init__(model, seen, frozen)
        self.norms, self.stream = norms, Stream(width)
        self.made: dict[int, Step] = {}
        for step in seen.steps:
            for value in step.results:
                self.made.setdefault(id(value), step)

    def follow(self, start: Argument) -> Stream:
        """The stream that a tensor belongs to.

        Raises:
            RefusedError: if it cannot be rotated.
        """
        known: dict[int, Value] = {}
        waiting = [start.value]
        while waiting:
            value = waiting.pop()
            if id(value) not in known:
                known[id(value)] = value
                waiting += self._makers(value)
                waiting += [] if value.parameter is not None else self._readers_of(value)
        self.require_own(list(self.stream.parameters))
        for token in self.stream.tokens:
            if self.seen.reads[token] != 1 or self.parameters[token].shape[-1] != self.stream.width:
                raise RefusedError(f"{token}, which is added to the stream, is used otherwise too, or of another width")
        return self.stream

    def _makers(self, value: Value) -> list[Value]:
        """What the value is made of within the stream."""
        if value.parameter is not None:
            if value.parameter not in self.parameters:
                raise RefusedError(f"{value.parameter}, which is added to the stream, is a buffer")
            self.stream.tokens[value.parameter] = None
            return []
        step = self.made.get(id(value))
        if step is None:
            raise RefusedError("the stream is an input of the model")
        if step.function in LAYERS:
            weight, bias = step.argument(1, "weight"), step.argument(2, "bias")
            name = name_of(weight)
            if name is None or (bias is not None and name_of(bias) is None) or step.function.startswith("conv_t"):
                raise RefusedError(f"{step.module} writes to the stream, whose weight or bias is computed")
            if step.function != "linear" and int(step.argument(6, "groups", 1)) > 1:
                raise RefusedError(f"{step.module} writes to the stream in groups of channels")
            if self.seen.reads[name] != 1 or self.parameters[name].shape[0] != self.stream.width:
                raise RefusedError(f"{name} writes to the stream and elsewhere, or with another width")
            self.stream.writers[name] = Maker(name, name_of(bias))
            return []
        return self._within(step)

    def _readers_of(self, value: Value) -> list[Value]:
        """What the stream becomes where it is read."""
        if id(value) in self.results:
            raise RefusedError("the stream is an output of the model")
        self.require_unwatched(value)
        found: list[Value] = []
        for step in self.readers.get(id(value), ()):
            pair = self.norms.get(str(_weight(step))) if step.function in NORMS else None
            if pair is not None and step.function != "group_norm" and pair.channels == self.stream.width:
                if not pair.shifts and pair.maker.bias is not None:
                    raise RefusedError(f"the layers behind {pair.name} cannot take its bias")
                if any(reader.groups > 1 or reader.transposed for reader in pair.readers):
                    raise RefusedError(f"the layers behind {pair.name} do not read all channels together")
                self.stream.norms[pair.maker.weight] = pair
            elif step.function in LAYERS and step.argument(0, "input").value is value:
                reader = self.reader(step, self.stream.width, [step])
                if reader.groups > 1 or reader.transposed:
                    raise RefusedError(f"{step.module} reads the stream in groups of channels")
                self.stream.readers[reader.weight] = reader
            else:
                self._within(step)
                found += step.results
        return found

    def _within(self, step: Step) -> list[Value]:
        """The tensors of a step that keeps channels of the stream apart from nothing else."""
        given = [part.value for part in step.given]
        if step.function in SUMS and len(given) == 2:
            return given
        if step.function in _CONCATENATIONS or (step.function in KEEPING and len(given) == 1):
            return given
        raise RefusedError(f"{step.function} in {step.module or 'the model'} reads or writes the stream")


def _weight(step: Step) -> str | None:
    return name_of(step.argument(2, "weight"))


@torch.no_grad()
def rotate(model: nn.Module, stream: Stream) -> Callable[[], None]:
    """Rotate a stream and return what undoes it; computed in float64."""
    old = {name: None if (p := parameter(model, name)) is None else p.clone() for name in stream.parameters}
    new = {name: value.cpu().double() for name, value in old.items() if value is not None}
    turn = rotation(stream.width)
    for pair in stream.norms.values():
        gain, shift = new[pair.maker.weight], new.get(pair.maker.bias or "")
        for reader in pair.readers:
            if shift is not None and reader.bias is not None:
                bias = new.get(reader.bias, torch.zeros_like(new[reader.weight].flatten(1)[:, 0]))
                new[reader.bias] = reader.shifted(bias, new[reader.weight], torch.ones_like(gain), -shift)
            new[reader.weight] = _turned(reader.scaled(new[reader.weight], gain), turn)
    for pair in stream.norms.values():
        new[pair.maker.weight] = torch.ones_like(new[pair.maker.weight])
        if pair.maker.bias is not None:
            new[pair.maker.bias] = torch.zeros_like(new[pair.maker.bias])
    for reader in stream.readers.values():
        new[reader.weight] = _turned(new[reader.weight], turn)
    for writer in stream.writers.values():
        new[writer.weight] = (turn @ new[writer.weight].flatten(1)).view_as(new[writer.weight])
        if writer.bias is not None:
            new[writer.bias] = turn @ new[writer.bias]
    for token in stream.tokens:
        new[token] = new[token] @ turn.T
    dtype = next(value.dtype for value in old.values() if value is not None)
    write(model, {name: value.to(dtype) for name, value in new.items()})

    def undo() -> None:
        write(model, {name: value for name, value in old.items() if value is not None})
        for name in (name for name in new if old[name] is None):
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._parameters[last] = None

    return undo


def _turned(weight: Tensor, turn: Tensor) -> Tensor:
    """A weight that reads R x where it read x: ``W R^T`` along its input channels."""
    return (weight.movedim(1, -1) @ turn.T).movedim(-1, 1)
