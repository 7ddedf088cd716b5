"""`allocate`: from sensitivities and a budget to a width for every layer, channel or activation.

The losses of widths add up (to first order: RDO-Q's supplement, equation 6), and so do their costs: the choice is a
knapsack with multiple choices, which `lq.allocation.solvers` solves and bounds from below. Here tensors become its
items. What they lose together counts with ``cross_terms=True`` (`lq.allocation.crossed`).
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lq.allocation.budget import Budget, Costs, parse_budget
from lq.allocation.counting import Choice, Counting, Limit
from lq.allocation.crossed import crossed
from lq.allocation.solvers import Problem
from lq.allocation.solvers import solver as solver_of
from lq.allocation.solvers.products import merge
from lq.attachment.sites import quantizers
from lq.bars import stage
from lq.errors import DataError, NoEffectWarning, SpecError
from lq.files import named, parse_json, read_text, schema
from lq.quantizer.spec import check_bits, width_in_file
from lq.sensitivity.table import Sensitivity
from lq.structure.patterns import select
from lq.tables import Table

Array = NDArray[np.float64]
Granularity = Literal["layer", "channel"]
Joint = Literal["joint"]

# What a saved allocation looks like.
_WIDTHS = schema.array(width_in_file, least=1, into=tuple)
_ALLOCATION = schema.record(
    {
        "weights": schema.mapping(lambda bits: _WIDTHS(bits) if isinstance(bits, list) else width_in_file(bits)),
        "activations": schema.mapping(width_in_file),
        "loss": schema.number(),
        "bound": schema.number(),
        "costs": schema.mapping(schema.text),
        "metric": schema.text,
        "solver": schema.text,
    }
)


@dataclass(frozen=True)
class Allocation:
    """A width for every weight, and for activations if they were allocated.

    Args:
        weights: by name of layer (or of a weight at a call), its width, or one for each of its output channels.
        activations: by name of site, its width.
        loss: expected increase of the loss, in units of the metric.
        bound: no allocation within the budgets has a smaller one, by the same measurement.
        costs: what the budgets come to, by their description.
        metric: what sensitivity was measured by.
        solver: how the widths were chosen.
    """

    weights: dict[str, int | tuple[int, ...]]
    activations: dict[str, int]
    loss: float
    bound: float
    costs: dict[str, str]
    metric: str
    solver: str

    @property
    def gap(self) -> float:
        """Share of the bound by which the loss may exceed the optimum."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(self.bound, 1e-300)

    def is_in(self, model: nn.Module) -> bool:
        """Whether the quantizers of `model` have these widths."""
        found = {quantizer.name: quantizer.bits.cpu() for quantizer in quantizers(model)}
        weights = {name if name in found else f"{name}.weight".lstrip("."): b for name, b in self.weights.items()}
        return all(
            name in found and bool((found[name] == torch.as_tensor(bits, dtype=torch.float32)).all())
            for name, bits in {**weights, **self.activations}.items()
        )

    def to_json(self) -> str:
        """The allocation as JSON."""
        return json.dumps(vars(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Allocation":
        """The inverse of `to_json`.

        Raises:
            DataError: if `text` is something else.
        """
        try:
            return cls(**schema.read(parse_json(text), _ALLOCATION))
        except DataError as error:
            raise DataError(f"not a saved allocation: {error}; write allocation.to_json() to the file") from error

    @classmethod
    def load(cls, path: str | Path) -> "Allocation":
        """The allocation saved in a JSON file.

        Raises:
            DataError: if there is no such file, or it holds something else.
        """
        with named(path):
            return cls.from_json(read_text(path))

    def table(self) -> Table:
        """Widths by layer, ready to be shown."""
        rows = [
            (name, f"{np.mean(bits):.2f}", "/".join(str(b) for b in sorted({*np.atleast_1d(bits).tolist()})))
            for name, bits in [*self.weights.items(), *self.activations.items()]
        ]
        said = ", ".join(f"{cost} of {budget}" for budget, cost in self.costs.items())
        quality = f"at most {100 * self.gap:.2f} % above the least possible" if self.gap else "the least possible"
        note = f"{said}; {self.metric} {self.loss:.3g}, {quality} ({self.solver})"
        return Table(("layer or activation", "mean bits", "widths"), tuple(rows), (note,))

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()


def allocate(
    model: nn.Module,
    sensitivity: Sensitivity,
    budget: Any,
    *,
    solver: str = "lagrangian",
    bits: Sequence[int] | None = None,
    granularity: Granularity = "layer",
    activations: float | Joint | None = None,
    activation_bits: Sequence[int] | None = None,
    pins: Mapping[str, int | Sequence[int]] | None = None,
    layer_memory: str | float | None = None,
    cross_terms: bool = False,
) -> Allocation:
    """Choose the widths that are expected to lose least within a budget. The model stays as it is.

    Args:
        model: the model that was measured; only its sizes and operation counts are read.
        sensitivity: what widths cost, by `lq.measure_sensitivity`.
        budget: mean weight bits (``3.0``), compression (``"8x"``), stored bytes (``"1.5MB"``), bit operations per
            sample (``"2.5GBitOps"``), a `Latency`, or a list of several that all hold.
        solver: "greedy" (MPQCO), "lagrangian" (RDO-Q) or "exact".
        bits: widths that weights may have; by default all that were measured from 1 up. With 0 channels are pruned,
            which is further from the first order than the others and pays after fine-tuning, if at all.
        granularity: one width per layer, or per group of channels as measured.
        activations: None keeps their widths; a number is their own budget, the mean width over all values of a sample;
            "joint" has the budget count activations of one sample like weights.
        activation_bits: widths that activations may have; by default all that were measured from 2 up.
        pins: the widths that layers may have, by name pattern: ``{"fc": 8, "layer1": [4, 8]}``.
        layer_memory: largest size of one layer's weights, and of one activation of a sample, such as ``"64kB"``.
        cross_terms: also count what widths lose together, if the sensitivity was measured with ``cross_terms=True``.

    Returns:
        The allocation; write it into the model by ``lq.set_bits(model, found.weights, found.activations)``.

    Raises:
        DataError: if the sensitivity is of another model, or says nothing: no numbers, or zero for every tensor.
        BudgetError: if no allocation is within the budget; the message states what is possible.
        SpecError: for a budget, width or solver that does not exist.
        PatternError: for a pin that matches nothing.

    >>> import torch, lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), weights=4)
    >>> batches = [(torch.randn(32, 64), torch.randint(8, (32,)))]
    >>> found = allocate(model, lq.measure_sensitivity(model, batches), "8x")
    >>> sum(found.weights[name] * count for name, count in {"0": 4096, "1": 512}.items()) <= 4 * 4608
    True
    """
    costs = Costs.of(model)
    _check_sensitivity(sensitivity, model, costs)
    if isinstance(activations, (int, float)) and (isinstance(activations, bool) or not activations > 0):
        raise SpecError(f"activations={activations!r}; use None, 'joint' or a mean width in bits")
    if isinstance(activations, str) and activations != "joint":
        raise SpecError(f"activations={activations!r}; use None, 'joint' or a mean width in bits")
    if granularity not in ("layer", "channel"):
        raise SpecError(f"granularity={granularity!r} is unknown; use 'layer' or 'channel'")
    allowed = {"weight": _known(bits, 1, sensitivity), "activation": _known(activation_bits, 2, sensitivity)}
    items = _items(sensitivity, granularity, with_activations=activations is not None)
    if not items:
        raise SpecError("no tensor was measured that could be allocated; measure weights, or activations with them")
    losses = np.stack([item.losses for item in items])
    for row, item in zip(losses, items, strict=True):
        row[[width not in allowed[item.tensor.role] for width in sensitivity.widths]] = np.inf
    _pin(losses, items, costs, sensitivity.widths, pins or {})
    budgets = [parse_budget(one) for one in (budget if isinstance(budget, (list, tuple)) else [budget])]
    if not budgets:
        raise SpecError(f"budget={budget!r} limits nothing; give one, such as 3.0 or '8x', or a list of several")
    count = Counting(items, costs, np.array(sensitivity.widths, dtype=float), activations == "joint")
    limits = [Limit(one, count.table(one), count.fixed(one), pairs=count.pairs(one)) for one in budgets]
    if activations is not None and activations != "joint":
        mean = Budget("bits", float(activations))
        limits.append(Limit(mean, count.mean_bits("activation"), 0.0, "of activations"))
    losses = count.without_missing(losses, limits)
    if layer_memory is not None:
        losses = count.within_memory(losses, layer_memory)
    tables = np.stack([np.nan_to_num(limit.table) for limit in limits])
    with_pairs = [i for i, limit in enumerate(limits) if limit.pairs]
    if len(with_pairs) > 1:
        raise SpecError(
            f"{' and '.join(limits[i].name for i in with_pairs)} both count products of widths that are allocated; one "
            "budget can: give the stricter alone, or keep the widths of activations"
        )
    multiplied = with_pairs[0] if with_pairs else 0
    activation_items = {i for i, item in enumerate(items) if item.tensor.role == "activation"}
    merged = merge(losses, tables, limits[multiplied].pairs, multiplied, count.widths, activation_items)
    left, names = np.array([limit.left for limit in limits]), tuple(limit.name for limit in limits)
    problem = Problem(merged.losses, merged.costs, left, names)
    for limit, least, greatest in zip(limits, problem.least_costs, problem.greatest_costs, strict=True):
        limit.check(float(least), float(greatest))
    with stage("Allocating", f"{len(merged.losses)} choices"):
        found = solver_of(solver)(problem)
        if cross_terms:
            found = crossed(problem, found, merged, items, sensitivity)
    chosen = [sensitivity.widths[i] for i in merged.unmerged(found.choice)]
    weights, widths_of_activations = _widths(items, chosen)
    return Allocation(
        weights=weights,
        activations=widths_of_activations,
        loss=found.loss,
        bound=found.bound,
        costs={limit.name: limit.show(float(cost)) for limit, cost in zip(limits, found.costs, strict=True)},
        metric=sensitivity.metric,
        solver=solver,
    )


def _check_sensitivity(sensitivity: Sensitivity, model: nn.Module, costs: Costs) -> None:
    """Raise if the table says nothing, or is of another model; warn of weights that it leaves out.

    Raises:
        DataError: saying what was found.
    """
    tensors = {tensor.name: tensor for tensor in sensitivity.tensors}
    missing = [name for name in tensors if name not in costs.tensors]
    if missing:
        raise DataError(f"the sensitivity has {missing[0]!r}, the model has not; measure it on this model")
    sizes = {quantizer.name: quantizer.bits.numel() for quantizer in quantizers(model)}
    for name, tensor in tensors.items():
        cost = costs.tensors[name]
        if tensor.role == "weight" and cost.numel and (tensor.numel or cost.numel) != cost.numel:
            raise DataError(
                f"the sensitivity of {name} is of {tensor.numel} values, the model has {cost.numel}; measure it on "
                "this model"
            )
        if tensor.role == "weight" and tensor.channels not in (1, sizes[name]):
            raise DataError(
                f"the sensitivity of {name} is of {tensor.channels} channels, the model has {sizes[name]}; measure it "
                "on this model"
            )
        if not np.isfinite(tensor.loss).all() or not np.isfinite(tensor.group_loss).all():
            raise DataError(f"the sensitivity of {name} has NaN or Inf; look at the batches it was measured on")
    if tensors and not any(tensor.loss.any() for tensor in tensors.values()):
        raise DataError(
            f"the sensitivity is zero for all of {len(tensors)} tensors at every width, so that any allocation would "
            "do; look at the labels and the loss that it was measured with"
        )
    weights = [name for name, cost in costs.tensors.items() if cost.role == "weight"]
    left = [name for name in weights if name not in tensors]
    if left and len(left) < len(weights):
        warnings.warn(
            f"{len(left)} of {len(weights)} weights are not in the sensitivity: they keep their widths and do not "
            f"count towards mean bits ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})",
            NoEffectWarning,
            stacklevel=3,
        )


def _widths(items: Sequence[Choice], chosen: Sequence[int]) -> tuple[dict[str, int | tuple[int, ...]], dict[str, int]]:
    """The chosen widths by layer, and by activation."""
    by_channel: dict[str, list[int]] = {}
    weights: dict[str, int | tuple[int, ...]] = {}
    activations: dict[str, int] = {}
    for item, width in zip(items, chosen, strict=True):
        # the layer's name; a weight at a call keeps its own
        name = f".{item.tensor.name}".removesuffix(".weight").lstrip(".")
        if item.tensor.role == "activation":
            activations[item.tensor.name] = width
        elif item.channels is None:
            weights[name] = width
        else:
            by_channel.setdefault(name, []).extend([width] * (item.channels.stop - item.channels.start))
    return {**weights, **{name: tuple(widths) for name, widths in by_channel.items()}}, activations


def _known(bits: Sequence[int] | None, least: int, sensitivity: Sensitivity) -> set[int]:
    """The widths asked for; by default all that were measured, from `least` up."""
    chosen = {b for b in sensitivity.widths if b >= least} if bits is None else {check_bits(width) for width in bits}
    unknown = chosen - set(sensitivity.widths)
    if not chosen or unknown:
        raise SpecError(f"bits={bits}: choose from the widths that were measured, {sensitivity.widths}")
    return chosen


def _items(sensitivity: Sensitivity, granularity: Granularity, *, with_activations: bool) -> list[Choice]:
    items = []
    for tensor in sensitivity.tensors:
        if tensor.role == "activation" and not with_activations:
            continue
        if granularity == "layer" or tensor.channels == 1:
            items.append(Choice(tensor, None, 1.0, tensor.loss.copy()))
            continue
        if not len(tensor.group_loss):
            raise SpecError(f"{sensitivity.metric} was measured by layer only; use granularity='layer'")
        for start, losses in zip(range(0, tensor.channels, sensitivity.group), tensor.group_loss, strict=True):
            stop = min(start + sensitivity.group, tensor.channels)
            items.append(Choice(tensor, slice(start, stop), (stop - start) / tensor.channels, losses.copy()))
    return items


def _pin(
    losses: Array,
    items: Sequence[Choice],
    costs: Costs,
    widths: Sequence[int],
    pins: Mapping[str, int | Sequence[int]],
) -> None:
    """Leave only the pinned widths."""
    names = [item.tensor.name for item in items]
    for pattern, pinned in pins.items():
        chosen = select(pattern, names + [costs.tensors[name].layer for name in names], argument="pins")
        allowed = {check_bits(b) for b in ([pinned] if isinstance(pinned, int) else pinned)}
        unknown = allowed - set(widths)
        if unknown or not allowed:
            raise SpecError(f"pins[{pattern!r}]={pinned!r}; use widths that were measured: {tuple(widths)}")
        for row, item in zip(losses, items, strict=True):
            if {item.tensor.name, costs.tensors[item.tensor.name].layer} & chosen:
                free = np.array([width in allowed for width in widths])
                row[:] = np.where(free, item.losses, np.inf)
