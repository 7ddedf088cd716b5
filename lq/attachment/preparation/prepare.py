r"""Prepare a float model for quantization, without changing what it computes.

**LayerNorm reparameterization** (RepQ-ViT, Li et al., ICCV 2023, arXiv:2212.08254). After a layer norm the ranges of
channels differ by orders of magnitude, and one step for all fits none. With r and t of each channel,

    gamma' = gamma / r,  beta' = beta / r + t,  W' = W diag(r),  b' = b - W' t,

the norm gives ``y' = y / r + t``, whose channels have one range, and the layers behind it compute what they did. Here r
may be a power of the ratio of ranges, chosen by a predicted error (`lq.attachment.preparation.strength`).

**Rotation**, on request: see `lq.attachment.preparation.rotation`.

**Cross-layer equalization** (DFQ, Nagel et al., ICCV 2019, arXiv:1906.04721). The same between two layers with nothing
or a positive-homogeneous function (ReLU) between them.

Both are found by running the model once (`lq.attachment.preparation.following`), and checked by running it again: what
changes an output by more than 1e-5 of its norm is taken back. All that is left is plain weights; nothing is computed
in addition.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from lq.attachment.folding_check import running
from lq.attachment.preparation.channel_ranges import ChannelRanges
from lq.attachment.preparation.checking import Check, named_weights
from lq.attachment.preparation.following import find
from lq.attachment.preparation.observing import observed
from lq.attachment.preparation.parts import Left, Pair, Rescaling
from lq.attachment.preparation.rotation import find_stream
from lq.attachment.preparation.rotation import rotate as rotate_stream
from lq.attachment.preparation.stored import is_prepared, parameter, remember, remember_rotation, rescalings
from lq.attachment.preparation.strength import Widths, by_ranges, by_weights
from lq.attachment.sites import is_attached
from lq.errors import DataError, SpecError, StateError
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward, run
from lq.structure.tracing import trace
from lq.tables import Table

#: What cross-layer equalization brings to one range: the weights of the two layers, or the channels between them.
Equalize = Literal["weights", "activations"]
#: Times that all pairs of layers are equalized one after the other.
_ROUNDS = 20


@dataclass(frozen=True)
class Prepared:
    """One pair that was rescaled.

    Args:
        name: module of the norm or layer that makes the tensor.
        kind: "norm" or "layer".
        readers: the layers that read it.
        channels: its number of channels.
        shifted: whether its channels were shifted too.
        power: power of the ratio of ranges; None if the weights decided.
        spread: the largest r over the smallest.
    """

    name: str
    kind: str
    readers: tuple[str, ...]
    channels: int
    shifted: bool
    power: float | None
    spread: float


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did: the pairs it rescaled, and what it left and why."""

    pairs: tuple[Prepared, ...]
    left: tuple[Left, ...]

    def table(self) -> Table:
        """Pairs as rows; what was left, and why, as notes."""
        rows = [
            (
                pair.name or "(model)",
                pair.kind,
                ", ".join(pair.readers),
                str(pair.channels),
                "scale and shift" if pair.shifted else "scale",
                "-" if pair.power is None else f"{pair.power:g}",
                f"{pair.spread:.1f}",
            )
            for pair in self.pairs
        ]
        header = ("rescaled", "kind", "read by", "channels", "by", "power", "largest / smallest r")
        return Table(header, tuple(rows), tuple(f"left: {one}" for one in self.left))

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()


def prepare(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    norms: bool = True,
    equalize: Equalize | None = None,
    weights: int | None = 4,
    activations: int | None = 4,
    power: float | None = None,
    rotate: bool = False,
    frozen: bool = False,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
) -> Preparation:
    """Rescale the channels of a float model, in place, so that few bits fit them better; its outputs stay the same.

    Pairs are those that the first batch runs in eval mode. A pair is left, and the report says why, if something reads
    the tensor that cannot take a scale of channels (a residual sum, GELU, attention, an output of the model), if a
    parameter is shared, computed, or frozen, or if the outputs on the first batch would change.

    A float checkpoint of the model as it was still loads, and is rescaled on the way in; checkpoints of the prepared
    model have two entries more, which tell. `lq.load` knows them in quantized checkpoints; before a float one of a
    prepared model is loaded into one that is not, call `lq.attachment.preparation.stored.match` with the two.

    Args:
        model: a model without quantizers; fold its BatchNorms first if they should be.
        batches: any iterable of batches, read once; some hundred samples are enough. Labels are not used.
        norms: rescale what norms give (LayerNorm, RMSNorm, GroupNorm, written out or not) to the layers behind them.
        equalize: also rescale between two layers with nothing or a ReLU between them: "weights" brings the rows of the
            first and the columns of the second to one range (for weights with one step per tensor), "activations" the
            channels between them (for weights with a step per output channel, as lq's). None: not at all.
        weights: width in bits of the weights that read, which the balance is chosen for; None: they stay float.
        activations: width in bits of the activations between.
        power: power of the ratio of ranges, from 0 (nothing) to 1 (all channels get one range, as in RepQ-ViT); None:
            for each pair the one with the least error that is predicted for these widths.
        rotate: first rotate the residual stream (ViT, DeiT; see `lq.attachment.preparation.rotation`), if only norms
            with layers behind them read it. Float checkpoints of the model before are refused then.
        frozen: also change parameters with ``requires_grad=False``; pairs that have one are left otherwise.
        forward: how to run the model on a batch, as in `lq.calibrate`.
        reduce: combines a tensor over ranks, as in `lq.calibrate`.

    Returns:
        What was rescaled, what was not, and why.

    Raises:
        SpecError: for an `equalize` or a `power` that does not exist.
        StateError: if the model has quantizers already.
        DataError: if there are no batches, the model does not take one, or a tensor in it has NaN or Inf.

    >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    >>> [(pair.name, pair.readers) for pair in prepare(model, [torch.randn(32, 8)]).pairs]
    [('0', ('1',))]
    """
    _require_options(equalize, power)
    if is_attached(model):
        raise StateError(
            "lq.prepare changes float weights, and this model has quantizers, whose ranges would not fit: "
            "lq.detach(model), lq.prepare(model, batches), then lq.attach(model, ...) again"
        )
    iterator = iter(batches)
    example = next(iterator, None)
    if example is None:
        raise DataError("lq.prepare got no batches: the loader is empty; give it at least one batch")
    left = _rotated(model, example, forward, frozen, reduce) if rotate else ()
    plan = plan_pairs(model, example, forward, norms=norms, layers=equalize is not None, frozen=frozen)
    plan = replace(plan, left=(*left, *plan.left))
    return apply(
        model,
        plan,
        itertools.chain([example], iterator),
        example,
        equalize=equalize,
        widths=lambda _: Widths(weights, activations),
        power=power,
        forward=forward,
        reduce=reduce,
    )


def _rotated(
    model: nn.Module, example: Any, forward: Forward | None, frozen: bool, reduce: Reduce | None
) -> tuple[Left, ...]:
    """Rotate the residual stream; what is left, if that cannot be."""
    if is_prepared(model):
        raise StateError(
            "rotate=True has to come first, and this model was prepared already: build it anew, load its float "
            "weights, and call lq.prepare(model, batches, rotate=True) once"
        )
    with running(model):
        seen = trace(model, lambda: run(model, example, forward), example)
    stream = find_stream(model, seen, find(model, seen, frozen=frozen, kinds=("norm",)).pairs, frozen=frozen)
    if isinstance(stream, str):
        return (Left("residual stream", stream),)
    check = Check(model, example, forward, reduce, _unchanged(stream.norms.values()))
    missing = [name for name in stream.parameters if parameter(model, name) is None]
    undo = rotate_stream(model, stream)
    if check.excess() > 1:
        undo()
        return (Left("residual stream", "rotating it would change what the model computes"),)
    remember_rotation(model, stream.parameters, [name for name in missing if parameter(model, name) is not None])
    return ()


@dataclass(frozen=True)
class Plan:
    """The pairs of a model that can be rescaled, and what cannot and why."""

    pairs: tuple[Pair, ...]
    left: tuple[Left, ...]


def plan_pairs(
    model: nn.Module,
    example: Any,
    forward: Forward | None = None,
    *,
    norms: bool = True,
    layers: bool = False,
    frozen: bool = False,
) -> Plan:
    """Find the pairs of a float model by running it on an example; nothing is changed."""
    kinds = tuple(kind for kind, wanted in (("norm", norms), ("layer", layers)) if wanted)
    with running(model):
        seen = trace(model, lambda: run(model, example, forward), example)
    found = find(model, seen, frozen=frozen, kinds=kinds)
    known, pairs, left = rescalings(model), [], list(found.left)
    for pair in found.pairs:
        before = known.get(pair.maker.weight)
        if before is None or _same_parameters(before.pair, pair):
            pairs.append(pair)
        else:
            left.append(Left(pair.name, f"it was prepared before, with {', '.join(before.pair.names)} as its readers"))
    return Plan(tuple(pairs), tuple(left))


def apply(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    example: Any,
    *,
    equalize: Equalize | None,
    widths: Callable[[Pair], Widths],
    power: float | None = None,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
) -> Preparation:
    """Rescale the pairs of a plan, in place, where that is exact; `widths` by pair, other arguments as of `prepare`."""
    check = Check(model, example, forward, reduce, _unchanged(plan.pairs))
    ranged = [pair for pair in plan.pairs if pair.kind == "norm" or equalize == "activations"]
    seen = observed(model, ranged, batches, forward, reduce) if ranged else {}
    done: list[tuple[Rescaling, float | None]] = []
    left = list(plan.left)
    for kind in ("norm", "layer"):
        pairs = [_with_its_bias(model, pair) for pair in plan.pairs if pair.kind == kind]
        by_range = kind == "norm" or equalize == "activations"
        wanted = _by_ranges(model, pairs, seen, widths, power) if by_range else _by_weights(model, pairs)
        powers = {one.pair: used for one, used in wanted}
        kept = check.kept([one for one, _ in wanted])
        exact = {one.pair for one in kept}
        kept += check.kept(
            [one.without_shift() for one, _ in wanted if one.pair not in exact and bool(one.shift.any())]
        )
        exact |= {one.pair for one in kept}
        done += [(one, powers[one.pair]) for one in kept]
        left += [_inexact(pair) for pair in pairs if pair not in exact]
    remember(model, [one for one, _ in done])
    return Preparation(tuple(_described(one, used) for one, used in done), tuple(left))


def _unchanged(pairs: Iterable[Pair]) -> set[str]:
    """Modules that read the pairs' tensors, and give what they gave before."""
    readers = {reader.weight.rpartition(".")[0] for pair in pairs for reader in pair.readers}
    return readers - {pair.maker.weight.rpartition(".")[0] for pair in pairs}


def _with_its_bias(model: nn.Module, pair: Pair) -> Pair:
    """The pair of a layer that has got a bias as the reader of a norm."""
    parent, _, _ = pair.maker.weight.rpartition(".")
    bias = f"{parent}.bias".lstrip(".")
    if pair.kind == "norm" or pair.maker.bias is not None or parameter(model, bias) is None:
        return pair
    return replace(pair, maker=replace(pair.maker, bias=bias))


def _by_ranges(
    model: nn.Module,
    pairs: Sequence[Pair],
    seen: dict[str, ChannelRanges],
    widths: Callable[[Pair], Widths],
    power: float | None,
) -> list[tuple[Rescaling, float | None]]:
    found: list[tuple[Rescaling, float | None]] = []
    for pair in pairs:
        weights = named_weights(model, [reader.weight for reader in pair.readers])
        scale, shift, used = by_ranges(pair, seen[pair.maker.weight], weights, widths(pair), power)
        found.append((Rescaling(pair, scale, shift), used))
    return found


def _by_weights(model: nn.Module, pairs: Sequence[Pair]) -> list[tuple[Rescaling, float | None]]:
    """Equalize all pairs by their weights, in rounds, on copies of the weights."""
    names = {name for pair in pairs for name in pair.parameters}
    weights = dict(named_weights(model, sorted(names)))
    total = {pair: Rescaling(pair, torch.ones(pair.channels), torch.zeros(pair.channels)) for pair in pairs}
    for _ in range(_ROUNDS):
        largest = 1.0
        for pair in pairs:
            scale = by_weights(pair, weights)
            one = Rescaling(pair, scale, torch.zeros_like(scale))
            weights |= one.parameters(weights.get)
            total[pair] = total[pair].then(one.scale, one.shift)
            largest = max(largest, float(scale.max()), float(1 / scale.min()))
        if largest < 1.001:
            break
    return [(one, None) for one in total.values()]


def _inexact(pair: Pair) -> Left:
    return Left(pair.name, f"rescaling it with {', '.join(pair.names)} would change what the model computes")


def _described(one: Rescaling, power: float | None) -> Prepared:
    pair, spread = one.pair, float(one.scale.max() / one.scale.min())
    return Prepared(pair.name, pair.kind, pair.names, pair.channels, bool((one.shift != 0).any()), power, spread)


def _same_parameters(one: Pair, other: Pair) -> bool:
    return one.maker == other.maker and {r.weight for r in one.readers} == {r.weight for r in other.readers}


def _require_options(equalize: object, power: float | None) -> None:
    if equalize is not None and equalize not in get_args(Equalize):
        raise SpecError(f"equalize={equalize!r} is unknown; use 'weights', 'activations' or None")
    if power is not None and not 0 <= power <= 1:
        raise SpecError(f"power={power!r} is no power of the ratio of ranges; use a number from 0 to 1, or None")
