"""The quantizers of a unit: what of it is learned, where it starts, what ranges its activations have."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import float_weight, weight_quantizer
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.histogram import Reduce
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.reconstruction.capture import Inputs, call
from lq.reconstruction.rounding import WeightGrid
from lq.reconstruction.rounding.feedback import Correlation
from lq.reconstruction.units import Unit


class UnitQuantizers:
    """The quantizers of a unit.

    Args:
        modules: the modules of the unit.
        done: identities of weights and quantizers that earlier units have settled.
    """

    def __init__(self, modules: Sequence[nn.Module], done: set[int]) -> None:
        inside = [part for module in modules for part in module.modules()]
        weights: dict[int, tuple[WeightQuantizer, nn.Parameter]] = {}
        for part in inside:
            quantizer, weight = weight_quantizer(part), float_weight(part)
            if quantizer is not None and weight is not None and id(weight) not in done:
                weights.setdefault(id(weight), (quantizer, weight))
        owners = [part.owner for part in inside if isinstance(part, SharedQuantizer)]
        found = [*(part for part in inside if isinstance(part, ActivationQuantizer)), *owners]
        self.activations = list({id(part): part for part in found}.values())
        self.weights = list(weights.values())
        self.learned = [part for part in self.activations if id(part) not in done]
        layers = [part for part in inside if any(float_weight(part) is weight for _, weight in self.weights)]
        biases = [part._parameters.get("bias") for part in layers]
        self.biases = list({id(bias): bias for bias in biases if bias is not None and id(bias) not in done}.values())

    def state(self) -> list[Tensor]:
        """The tensors that this unit decides."""
        steps = [state for part in self.learned for state in (part.log2_step, part.zero_point)]
        return [*(weight for _, weight in self.weights), *self.biases, *steps]

    def settled(self) -> set[int]:
        """Identities of what this unit decides."""
        return {id(part) for part in (*(weight for _, weight in self.weights), *self.learned, *self.biases)}


def quantizers_of(model: nn.Module, units: Sequence[Unit]) -> list[UnitQuantizers]:
    """The quantizers of each unit, in the order they run; what several units share is the first one's."""
    found: list[UnitQuantizers] = []
    done: set[int] = set()
    for unit in units:
        found.append(UnitQuantizers(unit.bind(model), done))
        done |= found[-1].settled()
    return found


@contextmanager
def tapped(quantizer: WeightQuantizer | ActivationQuantizer, tap: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a quantizer return what `tap` makes of its tensor."""
    before, quantizer.tap = quantizer.tap, tap
    try:
        yield
    finally:
        quantizer.tap = before


@torch.no_grad()
def refit_ranges(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    inputs: Inputs,
    samples: int,
    batch_size: int,
    reduce: Reduce | None,
) -> None:
    """Fit the ranges of a unit's activations to those of the float network, which it is to be near to.

    Args:
        modules: the modules of the unit.
        quantizers: its quantizers; those that an earlier unit has settled keep their range.
        inputs: from the float network.
        samples: number of samples on this rank.
        batch_size: samples to run at a time.
        reduce: combines a tensor over ranks.
    """
    with ExitStack() as stack:
        for quantizer in [q for q, _ in quantizers.weights] + quantizers.activations:
            stack.enter_context(tapped(quantizer, lambda x: x))
        observed = [part.observe() for part in quantizers.learned]
        for start in range(0, samples, batch_size):
            call(modules, inputs.batch(slice(start, min(start + batch_size, samples))), inputs.spec)
    for part, histogram in zip(quantizers.learned, observed, strict=True):
        if reduce is not None:
            histogram.reduce(reduce, part.bits.device)
        if histogram.counts is not None:
            part.calibrate(histogram)


@torch.no_grad()
def feedback_levels(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    grid: WeightGrid,
    inputs: Inputs,
    samples: int,
    batch_size: int,
    reduce: Reduce | None,
) -> Tensor:
    """The levels that error feedback chooses, (W,); the nearest ones of layers it does not know."""
    ours = {id(weight) for _, weight in quantizers.weights}
    inside = [part for module in modules for part in module.modules() if id(float_weight(part)) in ours]
    parts = [part for part in inside if isinstance(part, (nn.Linear, nn.Conv2d))]
    seen = {id(weight): Correlation(part) for part in parts if (weight := float_weight(part)) is not None}
    met: list[tuple[Correlation, Tensor]] = []  # counted after the run, whose own products are quantized by their order
    with ExitStack() as stack:
        for part in parts:
            note = partial(_note, met, seen[id(float_weight(part))])
            stack.callback(part.register_forward_hook(note, with_kwargs=True).remove)
        for start in range(0, samples, batch_size):
            call(modules, inputs.batch(slice(start, min(start + batch_size, samples))), inputs.spec)
            for correlation, x in met:
                correlation.add(x)
            met.clear()
    levels = []
    flat = (grid.values, *(torch.as_tensor(b, device=grid.values.device).expand_as(grid.values) for b in grid.bounds))
    rows = zip(*(grid.split(part) for part in (*flat, grid.nearest())), strict=True)
    for (_, weight), (values, low, high, offset, nearest) in zip(quantizers.weights, rows, strict=True):
        found = seen.get(id(weight))
        if found is None or found.total is None:
            levels.append(nearest.reshape(-1))
            continue
        if reduce is not None:
            found.total = reduce(found.total, "sum")
        levels.append(found.levels(*(part.flatten(1) for part in (values, low, high, offset))).reshape(-1))
    return torch.cat(levels) if levels else grid.values


def _note(
    met: list[tuple[Correlation, Tensor]], to: Correlation, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    met.append((to, (args[0] if args else kwargs["input"]).clone()))  # what comes may change it in place
