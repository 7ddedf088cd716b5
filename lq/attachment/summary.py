"""What a quantized model is made of: per layer and in total, as a table and as plain values."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.cost import count_macs
from lq.attachment.sites import (
    calls,
    float_weight,
    input_quantizer,
    quantized_layers,
    require_attached,
    weight_quantizer,
)
from lq.attachment.stored import CallWeight, call_weights, stay_float, stored_weights
from lq.quantizer.quantizer import Quantizer
from lq.structure.forward import Forward, eval_mode, run
from lq.structure.samples import batch_size
from lq.tables import Table, amount

FLOAT_BITS = 32
#: Bits that say which of its widths a channel has, where the channels of a layer differ.
WIDTH_BITS = 4


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer.

    Args:
        name: name of the layer in the model.
        kind: its class, such as "Conv2d".
        shape: shape of its weight; of several that a function uses (an LSTM's), of one beside the other.
        weight_bits: widths of the weight, ascending (several if channels differ), or of the right operand of a product
            of activations; empty: float.
        average_bits: mean width over the values of the weight.
        input_bits: width of its input, or of the left operand; None: float.
        bytes: size as stored: packed codes, widths where channels differ, steps, zero points and bias.
        macs: multiply-accumulates per sample; None if no batch was run.
        bitops: ``macs * weight bits * input bits``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: tuple[int, ...]
    average_bits: float
    input_bits: int | None
    bytes: int
    macs: float | None
    bitops: float | None


@dataclass(frozen=True)
class Summary:
    """A quantized model.

    Args:
        layers: its quantized layers, in order.
        bytes: size as stored, in bytes: the layers and everything that stays float.
        float_bytes: size of the model in float, in bytes.
        average_bits: mean width over all quantized weights that are stored as codes, in bits.
        bitops: total bit operations per sample of the quantized layers; None if no batch was run.
        notes: what is not stored as its width says, and why.
    """

    layers: tuple[LayerSummary, ...]
    bytes: int
    float_bytes: int
    average_bits: float
    bitops: float | None
    notes: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        """Float size over stored size."""
        return self.float_bytes / max(self.bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "compression": self.compression}

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, one row per layer."""
        return [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                "/".join(map(str, layer.weight_bits)) or "float",
                "float" if layer.input_bits is None else str(layer.input_bits),
                amount(layer.bytes, "B"),
                "-" if layer.bitops is None else amount(layer.bitops, ""),
            )
            for layer in self.layers
        ]

    def total(self) -> str:
        """The totals in one line."""
        bitops = "" if self.bitops is None else f", {amount(self.bitops, '')} bit operations per sample"
        return (
            f"{amount(self.bytes, 'B')} stored, "
            f"{self.compression:.2f}x smaller than float ({amount(self.float_bytes, 'B')}), "
            f"{self.average_bits:.2f} bits per quantized weight{bitops}"
        )

    def __str__(self) -> str:
        return str(self._table())

    def __rich__(self) -> Any:
        return self._table().__rich__()

    def _table(self) -> Table:
        return Table(HEADER, tuple(self.rows()), (self.total(), *self.notes))


HEADER = ("layer", "kind", "weight", "bits", "input bits", "size", "bit ops")


def summary(model: nn.Module, example: Any = None, *, forward: Forward | None = None) -> Summary:
    """Describe a quantized model: kind, shape, widths and size of each layer; total size, average width, BitOps.

    Args:
        model: a model with quantizers.
        example: a batch to count operations on; without it those counted by `lq.calibrate` are used.
        forward: how to run the model on it, as in `lq.calibrate`.

    Raises:
        StateError: if the model has no quantizers.

    >>> import lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(16, 16, bias=False)), weights=4, first_last=None)
    >>> print(summary(model))
    layer  kind    weight  bits  input bits  size   bit ops
    0      Linear  16x16   4     float       192 B  -
    192 B stored, 5.33x smaller than float (1.0 kB), 4.00 bits per quantized weight
    """
    require_attached(model, "lq.summary")
    counted: dict[str, float] | None = None
    if example is not None:
        with eval_mode(model), torch.no_grad():
            counted = count_macs(model, lambda: run(model, example, forward), batch_size(example))
    layers = []
    stored: set[int] = set()  # weights that an earlier layer counts
    for name, module in quantized_layers(model):
        macs = _noted_macs(module) if counted is None else counted.get(name)
        layers.append(_summarize(name, module, macs, stored))
    of_calls: dict[str, list[CallWeight]] = {}
    for call in call_weights(model):
        of_calls.setdefault(call.call, []).append(call)
    for name, operands in calls(model).items():
        if set(operands) != {"output"}:
            macs = next(iter(operands.values())).macs if counted is None else counted.get(name)
            layers.append(_summarize_call(name, operands, of_calls.get(name, []), macs))
    quantized = {id(t) for _, module in quantized_layers(model) for t in _own_tensors(module)}
    at_calls = stored_weights(model)
    quantized |= {id(call.parameter) for call in at_calls}
    quantizer_state = {
        id(t) for q in model.modules() if isinstance(q, Quantizer) for t in q.state_dict(keep_vars=True).values()
    }
    everything = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in quantizer_state}
    rest = sum(_bytes(t) for key, t in everything.items() if key not in quantized)
    weights = {
        id(w): (q, w.numel())
        for _, m in quantized_layers(model)
        if (q := weight_quantizer(m)) and (w := float_weight(m)) is not None
    }  # shared ones once
    weights |= {id(call): (call.quantizer, call.source.numel) for call in at_calls if call.source is not None}
    values = sum(count for _, count in weights.values())
    bits = sum(float(q.bits.detach().mean()) * count for q, count in weights.values())
    bitops = [layer.bitops for layer in layers if layer.bitops is not None]
    return Summary(
        layers=tuple(layers),
        bytes=rest + sum(layer.bytes for layer in layers),
        float_bytes=sum(_bytes(t) for t in everything.values()),
        average_bits=bits / values if values else float(FLOAT_BITS),
        bitops=sum(bitops) if bitops else None,
        notes=tuple(note for note in [stay_float(model)] if note),
    )


def _summarize(name: str, module: nn.Module, macs: float | None, stored_before: set[int]) -> LayerSummary:
    weight, quantizer, site = float_weight(module), weight_quantizer(module), input_quantizer(module)
    kind = type(module).__name__.removeprefix("Parametrized")
    shape = () if weight is None else tuple(weight.shape)
    count = 0 if weight is None else weight.numel()
    average = float(FLOAT_BITS) if quantizer is None else float(quantizer.bits.detach().mean())
    input_bits = None if site is None or not site.calibrated else int(site.bits.detach())
    stored = sum(_bytes(t) for t in _own_tensors(module) if t is not weight)
    again = weight is not None and id(weight) in stored_before
    stored_before.add(id(weight))
    if not again and weight is not None:
        stored += _bytes(weight) if quantizer is None else -(-_code_bits(quantizer, count) // 8)
    for part in (None if again else quantizer, site):
        if part is not None:
            stored += _grid_bytes(part)
    return LayerSummary(
        name=name,
        kind=kind,
        shape=shape,
        weight_bits=()
        if quantizer is None
        else tuple(sorted({int(b) for b in quantizer.bits.detach().flatten().tolist()})),
        average_bits=average,
        input_bits=input_bits,
        bytes=stored,
        macs=macs,
        bitops=None if macs is None else macs * average * (FLOAT_BITS if input_bits is None else input_bits),
    )


def _summarize_call(
    name: str, operands: dict[str, Quantizer], weights: list[CallWeight], macs: float | None
) -> LayerSummary:
    """A call. Weights that stay float count with the rest of the model, those of two calls with the first."""
    second = [q for operand, q in operands.items() if "weight" in operand or operand == "right"]
    first = [q for operand, q in operands.items() if operand in ("input", "left") and not q.unreached]
    counts = [1 if w.source is None else w.source.numel for w in weights] or [1] * len(second)
    average = float(FLOAT_BITS)
    if second:
        mean = sum(float(q.bits.detach().mean()) * count for q, count in zip(second, counts, strict=True))
        average = mean / sum(counts)
    input_bits = int(first[0].bits.detach()) if first and first[0].bits.ndim == 0 else None
    codes = [w for w in weights if not w.reason and not w.again]
    return LayerSummary(
        name=name,
        kind=name.rpartition(".")[2].rpartition("_")[0],
        shape=_together([w.source.shape for w in weights if w.source is not None]),
        weight_bits=tuple(sorted({int(b) for q in second for b in q.bits.detach().flatten().tolist()})),
        average_bits=average,
        input_bits=input_bits,
        bytes=sum(_grid_bytes(q) for q in operands.values())
        + sum(-(-_code_bits(w.quantizer, w.source.numel) // 8) for w in codes if w.source is not None),
        macs=macs,
        bitops=None if macs is None else macs * average * (FLOAT_BITS if input_bits is None else input_bits),
    )


def _together(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of weights one beside the other, if they are matrices of as many rows; else their number of values."""
    if len(shapes) < 2:
        return shapes[0] if shapes else ()
    if {(len(shape), shape[0]) for shape in shapes} == {(2, shapes[0][0])}:
        return shapes[0][0], sum(shape[1] for shape in shapes)
    return (sum(math.prod(shape) for shape in shapes),)


def _grid_bytes(quantizer: Quantizer) -> int:
    """Bytes of steps and, unless they are fixed, zero points."""
    fixed_zero = quantizer.is_weight and (quantizer.spec is None or quantizer.spec.symmetric)
    return _bytes(quantizer.log2_step) * (1 if fixed_zero else 2)


def _code_bits(quantizer: Quantizer | None, count: int) -> int:
    """Bits of the codes of a weight of `count` values, and of its channels' widths if these differ."""
    if quantizer is None:
        return 0
    widths = quantizer.bits.detach()
    told = WIDTH_BITS * widths.numel() if widths.numel() > 1 and bool((widths != widths[0]).any()) else 0
    return int(widths.double().sum()) * (count // max(widths.numel(), 1)) + told


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a quantized layer itself: weight, bias."""
    weight = float_weight(module)
    own = [t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None]
    return own if weight is None or any(t is weight for t in own) else [weight, *own]


def _noted_macs(module: nn.Module) -> float | None:
    for quantizer in (weight_quantizer(module), input_quantizer(module)):
        if quantizer is not None and quantizer.macs is not None:
            return quantizer.macs
    return None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
