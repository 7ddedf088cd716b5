"""Runs of the float and of the quantized network, and what each layer gives in both: the work of `lq.compare`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lq.attachment.interception import call_quantizers, watched_calls
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import float_weight, quantizers, weight_quantizer
from lq.attachment.tapping import rounded, tapped
from lq.errors import DataError
from lq.quantizer.histogram import Reduce
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.report.comparison.closeness import unpacked
from lq.report.comparison.result import Comparison, LayerComparison, Part
from lq.report.comparison.units import RESULT, Unit, find_units

# How much is written of names in notes.
_FEW = 4


class ComparedRuns:
    """Runs both networks and listens to them.

    Args:
        model: the quantized one.
        reference: the one whose quantizers do not round; may be the same.
        memory: bytes for outputs of one batch.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, memory: int) -> None:
        self.model, self.reference = model, reference
        self.units = find_units(model)
        self.room = max(memory // max(len(self.units) + 1, 1), 1)
        self.network = Unit("", "network", {})
        self.names = {id(module): name for one in (model, reference) for name, module in one.named_modules()}
        self.rounding = False  # which of both runs
        self.inside = False  # of a layer that is run alone
        self.weights_seen: set[str] = set()
        self._alone: dict[str, list[Any]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen to all layers and calls."""
        handles = []
        try:
            for name, unit in self.units.items():
                if not unit.is_layer:
                    continue
                ours, theirs = self.model.get_submodule(name), self.reference.get_submodule(name)
                # After the hooks by which enclosing modules note that a module runs, before those that note its end.
                handles += [
                    theirs.register_forward_pre_hook(partial(self._before, unit, ours), with_kwargs=True),
                    theirs.register_forward_hook(partial(self._after_float, unit), prepend=True),
                    ours.register_forward_hook(partial(self._after_quantized, unit), prepend=True),
                ]
            with watched_calls(self._call):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def batch(self, forward: Callable[[nn.Module], Any]) -> None:
        """Compare on one batch."""
        for unit in (self.network, *self.units.values()):
            unit.begin(self.room)
        self.rounding = False
        with tapped({q: self._tap(q) for q in quantizers(self.reference)}):
            output = forward(self.reference)
        self.network.see_float(output, output)
        self.rounding = True
        with tapped({q: self._result_tap(q) for q in quantizers(self.model)}):
            self.network.see_quantized(forward(self.model))
        for unit in (self.network, *self.units.values()):
            unit.end()

    # --- layers -----------------------------------------------------------------------------------------------------

    def _before(self, unit: Unit, ours: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.inside or self.rounding:
            return
        args, kwargs = _pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
        alone = self._run_alone(unit, {}, lambda: ours(*args, **kwargs))
        self._alone.setdefault(unit.name, []).append(alone)

    def _after_float(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        if not (self.inside or self.rounding):
            unit.see_float(output, self._alone[unit.name].pop())

    def _after_quantized(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        if self.rounding and not self.inside:
            unit.see_quantized(output)

    def _run_alone(self, unit: Unit, others: dict[str, Quantizer], compute: Callable[[], Any]) -> Any:
        """What a unit returns if its own quantizers round, and no others.

        Args:
            unit: the unit.
            others: quantizers that round instead of those of its parts, by name.
            compute: runs it.
        """
        taps: dict[Quantizer, Any] = {}
        for key, part in unit.parts.items():
            quantizer = others.get(key, part.quantizer)
            taps[quantizer] = partial(self._measured, unit, key, quantizer)
        self.inside = True
        try:
            with tapped(taps):
                return compute()
        finally:
            self.inside = False

    def _measured(self, unit: Unit, key: str, quantizer: Quantizer, x: Tensor) -> Tensor:
        if not quantizer.calibrated and not isinstance(quantizer, WeightQuantizer):
            return x  # calibration did not come there: it stays float
        heads = unit.kind in ("matmul", "attention") and not quantizer.is_weight
        original = None
        if isinstance(quantizer, WeightQuantizer) and unit.is_layer:
            original = float_weight(self.reference.get_submodule(unit.name))
        return unit.parts[key].rounded(quantizer, x, unit.rows, heads=heads, original=original)

    # --- calls ------------------------------------------------------------------------------------------------------

    def _call(self, module: nn.Module, keys: tuple[str, ...], compute: Callable[[], Any]) -> Any:
        prefix = self.names.get(id(module))
        units = [] if prefix is None else [self.units.get(f"{prefix}.{key}".lstrip(".")) for key in keys]
        chain = [unit for unit in units if unit is not None]
        if self.inside or not chain:
            return compute()
        last = chain[-1]
        if self.rounding:
            result = compute()
            last.see_quantized(result)
            return result
        for unit in chain[:-1]:
            unit.within = True
        if len(chain) > 1:
            last.kind = "attention"
        theirs: dict[str, Quantizer] = {}
        for place, quantizer in call_quantizers(module).items():
            owner = quantizer.owner if isinstance(quantizer, SharedQuantizer) else quantizer
            if isinstance(owner, Quantizer):
                theirs[f"{prefix}.{place}".lstrip(".")] = theirs[owner.name] = owner
        merged = Unit(last.name, last.kind, {})
        merged.parts = {key: part for unit in chain for key, part in unit.parts.items()}
        alone = self._run_alone(merged, theirs, compute)
        result = compute()
        last.see_float(result, alone)
        return result

    # --- quantizers -------------------------------------------------------------------------------------------------

    def _tap(self, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        """What a quantizer of the float network does: nothing, but for looking."""
        unit = self.units.get(quantizer.name)
        result = unit is not None and unit.kind == RESULT

        def tap(x: Tensor) -> Tensor:
            if self.inside:
                return x
            if isinstance(quantizer, WeightQuantizer):
                self.weights_seen.add(quantizer.name)
            elif result and unit is not None:
                unit.see_float(x, self._measured(unit, quantizer.name, quantizer, x))
            return x

        return tap

    def _result_tap(self, quantizer: Quantizer) -> Callable[[Tensor], Tensor] | None:
        """What a quantizer of the quantized network does: round; those of results are compared, too."""
        unit = self.units.get(quantizer.name)
        if unit is None or unit.kind != RESULT:
            return None

        def tap(x: Tensor) -> Tensor:
            found = rounded(quantizer, x)
            if unit is not None:
                unit.see_quantized(found)
            return found

        return tap

    def add_uncalled_weights(self) -> None:
        """Of layers that are not called themselves, while their weight is used: compare the weight."""
        for name, unit in self.units.items():
            if not unit.is_layer or unit.visits:
                continue
            quantizer = weight_quantizer(self.model.get_submodule(name))
            weight, original = (float_weight(one.get_submodule(name)) for one in (self.model, self.reference))
            if quantizer is None or weight is None or original is None:
                continue
            if quantizer.name in self.weights_seen:
                found = self._measured(unit, next(iter(unit.parts)), quantizer, weight)
                unit.alone.add(original.reshape(1, -1), found.reshape(1, -1))

    # --- the end ----------------------------------------------------------------------------------------------------

    def result(self, samples: int, reduce: Reduce | None) -> Comparison:
        """What all ranks have seen.

        Raises:
            DataError: if that is nothing.
        """
        units = [*self.units.values(), self.network]
        packed = [unit.packed() for unit in units]
        if reduce is not None:
            device = next(self.model.parameters(), torch.zeros(0)).device
            sizes = [part.numel() for parts in packed for part in parts]
            flat = torch.cat([*(p for parts in packed for p in parts), torch.tensor([float(samples)]).double()])
            total = reduce(flat.to(device), "sum").cpu()
            samples, pieces = round(float(total[-1])), iter(total[:-1].split(sizes))
            packed = [[next(pieces) for _ in parts] for parts in packed]
        if not samples:
            raise DataError("lq.compare got no batches: the loader is empty; give it at least one batch")
        *packed, of_network = packed
        rows: list[LayerComparison] = []
        waiting: dict[str, Part] = {}
        for index, (unit, found) in enumerate(zip(self.units.values(), packed, strict=True)):
            row = unit.row(index, found, waiting)
            if not found[2][2]:
                waiting = {}
            if row is not None:
                rows.append(row)
        rows.sort(key=lambda row: (row.alone is None, 0.0 if row.alone is None else row.alone.sqnr))
        return Comparison(tuple(rows), unpacked(of_network[1])[0], samples, tuple(self._notes(packed, rows)))

    def _notes(self, packed: list[list[Tensor]], rows: list[LayerComparison]) -> Iterator[str]:
        shown = {row.name for row in rows}
        within = {unit.name for unit, found in zip(self.units.values(), packed, strict=True) if found[2][2]}
        missing = [name for name in self.units if name not in shown | within]
        if missing:
            yield f"not reached by these batches: {_listed(missing)}"
        unlike = [u.name for u, found in zip(self.units.values(), packed, strict=True) if found[2][1]]
        if unlike:
            yield f"the quantized network takes another path than the float one, not all is compared: {_listed(unlike)}"
        wide = [part.name for row in rows for part in row.parts if part.beyond > 1]
        if wide:
            yield (
                "alone, ranges are widened where float values go beyond what calibration saw, behind quantized layers "
                f"or on other samples: {_listed(wide)}"
            )
        left = [u.name for u, found in zip(self.units.values(), packed, strict=True) if found[0][4] or found[1][4]]
        if left:
            yield f"values that are NaN or Inf do not count, some of {_listed(left)} are"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
