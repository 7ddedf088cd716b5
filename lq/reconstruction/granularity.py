r"""MRECG: which adjacent blocks are reconstructed together.

Where a block can hold much less, or much more, than the one before, the loss oscillates from unit to unit, and what is
lost there is lost for good. The k adjacent pairs with the largest difference are merged; pairs that meet make chains.
Two metrics:

- ModCap, without data: ``sum over layers of params * bits * alpha``, alpha > 1 for layers with a stride (1.6 here);
- Loss: the loss of each unit after a short preliminary reconstruction (all samples, few iterations).

Source: Ma et al., Solving Oscillation Problem in Post-Training Quantization Through a Theoretical Perspective (MRECG),
CVPR 2023; the published code holds the chosen merges, not the search. Deviates: differences are those of logarithms.
Plain ones are dominated by the last, widest blocks; with logarithms ModCap finds the merges that the authors list for
ResNet-18 (blocks 2 and 3, blocks 4 and 5).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lq.errors import SpecError
from lq.reconstruction.flow import Flow
from lq.reconstruction.quantized_model import Layer
from lq.reconstruction.units import Unit

#: How adjacent units are compared.
Metric = Literal["modcap", "loss"]

# alpha of layers with a stride.
_STRIDED = 1.6


@dataclass(frozen=True)
class Merges:
    """What was merged, and why.

    Args:
        metric: "modcap" or "loss".
        units: names of the units before.
        scores: capacity or loss of each.
        merged: names of the units after.
        unchained: pairs that would have been merged, but whose second unit reads more than the first one's output.
    """

    metric: str
    units: tuple[str, ...]
    scores: tuple[float, ...]
    merged: tuple[str, ...]
    unchained: tuple[tuple[str, str], ...]


def module_capacity(layers: Iterable[Layer]) -> float:
    """ModCap of a unit: bits of the weights of its layers, those of layers with a stride counted 1.6 times."""
    total = 0.0
    for layer in layers:
        if layer.quantizer is None:
            continue
        bits = float(layer.quantizer.bits.detach().mean()) * layer.weight.numel()
        stride = getattr(layer.module, "stride", 1)
        strided = max(stride) > 1 if isinstance(stride, tuple) else isinstance(stride, int) and stride > 1
        total += bits * (_STRIDED if strided else 1.0)
    return total


def merge_units(
    units: Sequence[Unit], flow: Flow, scores: Sequence[float], count: int, metric: Metric
) -> tuple[list[Unit], Merges]:
    """Merge the `count` adjacent pairs whose scores differ most.

    Args:
        units: units in the order they run.
        flow: which of them chain.
        scores: capacity or loss of each.
        count: number of pairs.
        metric: what the scores are, for the record.

    Raises:
        SpecError: if `count` is not positive.
    """
    if count < 1:
        raise SpecError(f"merges={count}; at least 1 pair has to be merged, or use units='block'")
    # The first and the last layer are no blocks: they keep their own widths and targets.
    inner = [k for k in range(len(units) - 1) if units[k].is_block and units[k + 1].is_block]
    ordered = sorted(inner, key=lambda k: -abs(_log(scores[k + 1]) - _log(scores[k])))
    chained = [k for k in ordered if flow.direct[k + 1] == k]
    chosen = set(chained[:count])
    last = max((ordered.index(k) + 1 for k in chosen), default=0)
    last = last if len(chosen) == count else max(last, count)
    missed = [k for k in ordered[:last] if flow.direct[k + 1] != k]
    merged: list[Unit] = []
    for k, unit in enumerate(units):
        if k - 1 in chosen:
            merged[-1] = Unit(merged[-1].modules + unit.modules, is_block=True)
        else:
            merged.append(unit)
    return merged, Merges(
        metric,
        tuple(unit.name for unit in units),
        tuple(scores),
        tuple(unit.name for unit in merged),
        tuple((units[k].name, units[k + 1].name) for k in missed),
    )


def _log(score: float) -> float:
    return math.log(max(score, 1e-30))
