"""What is compared: layers, calls and rounded results; and what one batch after the other has shown of each."""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lq.attachment.interception import call_quantizers
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import input_quantizer, quantized_layers, quantizers, weight_quantizer
from lq.attachment.tapping import rounded
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.report.comparison.advice import advice
from lq.report.comparison.closeness import Tally, decibels, exact, relative_errors, unpacked
from lq.report.comparison.result import LayerComparison, Part
from lq.structure.forward import tensors_of
from lq.structure.places import call_of

#: Kind of a tensor that is rounded by itself.
RESULT = "result"

# Values that go less far beyond the range are clipped, as they are in use.
_BEYOND = 1.25
# Errors above this share of a step are of clipped values.
_HALF_STEP = 0.5001


class Unit:
    """A layer, call or result, and the sums of what was seen of it.

    Args:
        name: its name in the model.
        kind: what it is.
        parts: the quantizers in it, by name.
    """

    def __init__(self, name: str, kind: str, parts: dict[str, Quantizer]) -> None:
        self.name = name
        self.kind = kind
        self.parts = {key: PartTally(quantizer) for key, quantizer in parts.items()}
        self.alone, self.together = Tally(), Tally()
        self.is_layer = False  # it is a module that is called
        self.visits = 0
        self.unlike = 0  # visits on one of two paths only
        self.within = False  # its result was seen as a step of another call only
        self.stored: deque[list[tuple[Tensor, torch.Size, int]]] = (
            deque()
        )  # float outputs of this batch, in their order
        self._room = 0

    def begin(self, room: int) -> None:
        """Begin a batch: `room` bytes may be stored."""
        self.stored.clear()
        self._room = room

    def see_float(self, x: object, alone: object) -> None:
        """Take in an output of the float network, and what it is with this unit alone quantized; keep some of it."""
        self.visits += 1
        kept = []
        for value, approximate in zip(_outputs(x), _outputs(alone), strict=False):
            most = max(self._room // (2 * value.element_size()), 1)  # later visits of this batch want room, too
            few = some(self.rows(value), most)
            self._room -= few.numel() * few.element_size()
            kept.append((few.clone(), value.shape, most))  # code behind it may change it in place
            self.alone.add(few, some(self.rows(approximate), most))
        self.stored.append(kept)

    def see_quantized(self, y: object) -> None:
        """Take in the output of the quantized network at the same visit."""
        if not self.stored:
            self.unlike += 1
            return
        for (x, shape, most), value in zip(self.stored.popleft(), _outputs(y), strict=False):
            if value.shape != shape:
                self.unlike += 1
                return
            self.together.add(x, some(self.rows(value), most).to(x.device))

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor as rows that count the same, (rows, values): tokens, or samples."""
        by_sample = tensor.ndim < 3 or self.kind.lower().startswith("conv") or (self.kind == RESULT and tensor.ndim > 3)
        if tensor.ndim == 0:
            return tensor.detach().reshape(1, 1)
        return (
            tensor.detach().flatten(1)
            if by_sample and tensor.ndim > 1
            else tensor.detach().reshape(-1, tensor.shape[-1])
        )

    def end(self) -> None:
        """End a batch."""
        self.unlike += len(self.stored)
        self.stored.clear()

    def packed(self) -> list[Tensor]:
        """What is added over ranks."""
        counts = torch.tensor([self.visits, self.unlike, float(self.within)], dtype=torch.double)
        return [self.alone.packed(), self.together.packed(), counts, *(part.sums for part in self.parts.values())]

    def row(self, index: int, packed: list[Tensor], borrowed: dict[str, Part]) -> LayerComparison | None:
        """The result of what all ranks have seen; None if nothing was."""
        alone, together, counts, *sums = packed
        seen = [part.found(key, total) for (key, part), total in zip(self.parts.items(), sums, strict=True)]
        parts = {part.name: part for part in seen if part is not None}
        if counts[2]:
            borrowed.update(parts)
            return None
        found = tuple({**borrowed, **parts}.values())
        close, close_together = unpacked(alone)[0], unpacked(together)[0]
        if close is None and not found:
            return None
        return LayerComparison(
            name=self.name,
            kind=self.kind,
            index=index,
            calls=int(counts[0]),
            parts=found,
            alone=close,
            together=close_together,
            advice=advice(self.name, found, close, close_together),
        )


class PartTally:
    """What rounding does to one tensor of a unit."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.sums = torch.zeros(4, dtype=torch.double)  # of relative errors, of rows; squared errors, those of clipping
        self.beyond = 1.0
        self._heads: Tensor | None = None

    @torch.no_grad()
    def rounded(
        self,
        quantizer: Quantizer,
        x: Tensor,
        rows: Callable[[Tensor], Tensor],
        *,
        heads: bool = False,
        original: Tensor | None = None,
    ) -> Tensor:
        """`x` rounded on its own, by the quantizer or a copy of it, and taken into account.

        Args:
            quantizer: rounds it.
            x: a weight or an activation.
            rows: makes rows of an activation.
            heads: whether dimension 1 holds attention heads.
            original: float weight to compare with, if `x` has changed since.

        Calibration sees activations behind quantized weights. Where float values go beyond what it saw, their grid is
        widened in proportion: that is the range that calibration behind the float network would have found.
        """
        factor = 1.0 if isinstance(quantizer, WeightQuantizer) else beyond(quantizer, x)
        self.beyond = max(self.beyond, factor)
        found = rounded(quantizer, x) if factor == 1.0 else rounded(quantizer, x / factor) * factor
        if x.is_floating_point() and x.numel():
            self._add(x if original is None else original.to(x), found, factor, rows)
            if heads and x.ndim == 4 and x.shape[1] > 1:
                most = x.detach().abs().amax((0, 2, 3)).float().cpu()
                same = self._heads is not None and self._heads.shape == most.shape
                self._heads = torch.maximum(self._heads, most) if self._heads is not None and same else most
        return found

    def _add(self, x: Tensor, found: Tensor, factor: float, rows: Callable[[Tensor], Tensor]) -> None:
        x, found = (t.detach().to(exact(t)).nan_to_num(0.0, 0.0, 0.0) for t in (x, found))
        step = self.quantizer.step.detach().to(x.device) * factor
        whole = isinstance(self.quantizer, WeightQuantizer)  # a weight counts as one row
        errors, norms = relative_errors(
            *((x.reshape(1, -1), found.reshape(1, -1)) if whole else (rows(x), rows(found)))
        )
        if step.numel() > 1 and isinstance(self.quantizer, WeightQuantizer):
            layout = self.quantizer.layout
            x, found, step = layout.split(x), layout.split(found), layout.spread(step, x)
        squares = (found - x).square()
        clipped = (squares * ((found - x).abs() > _HALF_STEP * step)).sum()
        counted = (norms > 0) | (errors > 0)
        sums = [errors[counted].sum().double(), counted.sum().double(), squares.sum().double(), clipped.double()]
        self.sums = self.sums + torch.stack(sums).cpu()

    def found(self, name: str, sums: Tensor) -> Part | None:
        """The result of the sums of all ranks; None if nothing was seen."""
        errors, rows, noise, clipped = sums.tolist()
        if not rows:
            return None
        spec = self.quantizer.spec
        heads = None
        if self._heads is not None and float(self._heads.min()) > 0:
            heads = float(self._heads.max() / self._heads.min())
        return Part(
            name=name,
            is_weight=self.quantizer.is_weight,
            bits=float(self.quantizer.bits.detach().mean()),
            sqnr=decibels(errors / rows),
            clipped=clipped / noise if noise else 0.0,
            range="" if spec is None else _rule(spec.range),
            per_channel=self.quantizer.bits.ndim > 0,
            heads=heads,
            beyond=self.beyond,
        )


def beyond(quantizer: Quantizer, x: Tensor) -> float:
    """How far values go beyond those that the range of an activation was found on, as a factor of 1 or more."""
    if not isinstance(quantizer, ActivationQuantizer) or not x.numel() or quantizer.bits.numel() != 1:
        return 1.0
    if quantizer.seen is not None:
        least, most = float(quantizer.seen.low.min()), float(quantizer.seen.high.max())
    elif quantizer.spec is not None and _rule(quantizer.spec.range) == "minmax":
        lowest, highest, _ = quantizer.bounds
        least, most = (float(end) * float(quantizer.step) for end in (lowest, highest))
    else:
        return 1.0
    ends = zip((float(end) for end in torch.aminmax(x.detach())), (least, most), strict=True)
    factors = [end / known for end, known in ends if known and math.isfinite(end)]
    found = max([1.0, *factors])
    return found if found > _BEYOND else 1.0


def _rule(rule: object) -> str:
    """Name of the rule that finds the range."""
    return rule if isinstance(rule, str) else type(rule).__name__.lower()


def find_units(model: nn.Module) -> dict[str, Unit]:
    """Layers, calls and results of a model that have quantizers, by name, in its order."""
    found: dict[str, Unit] = {}
    parts_of_units: set[int] = set()
    layers = dict(quantized_layers(model))
    for name, module in model.named_modules():
        units = [_layer(name, module)] if name in layers else []
        by_call: dict[str, dict[str, Quantizer]] = {}
        for place, quantizer in call_quantizers(module).items():
            one = quantizer.owner if isinstance(quantizer, SharedQuantizer) else quantizer
            if isinstance(one, Quantizer) and not place.endswith("_output"):
                key = f"{name}.{place}".lstrip(".")
                by_call.setdefault(call_of(place), {})[one.name if one is not quantizer else key] = one
        units += [Unit(f"{name}.{call}".lstrip("."), call.rpartition("_")[0], parts) for call, parts in by_call.items()]
        for unit in units:
            found[unit.name] = unit
            parts_of_units |= {id(part.quantizer) for part in unit.parts.values()}
    for quantizer in quantizers(model):
        is_result = quantizer.name.endswith("output") or id(quantizer) not in parts_of_units
        if is_result and quantizer.name not in found:
            found[quantizer.name] = Unit(quantizer.name, RESULT, {quantizer.name: quantizer})
    return found


def _layer(name: str, module: nn.Module) -> Unit:
    parts: dict[str, Quantizer] = {}
    weight, site = weight_quantizer(module), input_quantizer(module)
    if weight is not None:
        parts[f"{name}.weight".lstrip(".")] = weight
    if site is not None:
        parts[site.name] = site
    unit = Unit(name, type(module).__name__.removeprefix("Parametrized"), parts)
    unit.is_layer = True
    return unit


def some(table: Tensor, most: int) -> Tensor:
    """Rows of a table, evenly spaced, and evenly spaced values of them, no more than `most` values."""
    rows, values = table.shape
    skip = min(-(-rows * values // most), max(rows, 1))
    across = -(-values // max(most // max(-(-rows // max(skip, 1)), 1), 1)) if skip == rows else 1
    return table[:: max(skip, 1), :: across if across <= 1 else across | 1]  # odd, so that it goes through all channels


def _outputs(output: object) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [t for t in tensors_of(output) if t.is_floating_point() and t.layout == torch.strided and not t.is_nested]
