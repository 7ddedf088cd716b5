r"""Budgets: how much a model's widths may cost, in bits, bytes, bit operations or measured latency.

- ``3.0``: mean width of the stored weights, in bits. ``"8x"`` is the same as ``32 / 8``: published compression ratios
  count weights alone.
- ``"1.5MB"`` (or kB, MiB, ...): size of the whole model as stored, as `lq.summary` counts it: codes, steps, biases and
  what stays float.
- ``"2.5GBitOps"``: bit operations per sample, ``sum macs * weight bits * activation bits``.
- ``Latency("table.csv", 4.2)``: sum over layers of a measured table with the columns layer, bits, latency and, on
  request, input_bits. Layers that it leaves out cost nothing, with a warning; widths that it leaves out cannot be
  chosen.
"""

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lq.attachment.sites import (
    activation_quantizers,
    calls,
    float_weight,
    input_quantizer,
    quantized_layers,
    require_attached,
    weight_quantizer,
)
from lq.attachment.stored import call_weights, stored_weights
from lq.attachment.summary import FLOAT_BITS, summary
from lq.errors import DataError, SpecError
from lq.files import read_text
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.spec import check_bits
from lq.structure.site import Site

Kind = Literal["bits", "compression", "bytes", "bitops", "latency"]

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
# Of each kind: how its costs are shown, and the units that it may be written in, in lower case, with what they are.
_KINDS: dict[Kind, tuple[str, dict[str, float]]] = {
    "bits": ("{:.4g} bits", {"": 1.0, "bits": 1.0}),
    "compression": ("{:.4g}x", {"x": 1.0}),
    "bytes": (
        "{:.0f} bytes",
        {
            **{f"{prefix}b": scale for prefix, scale in _SCALES.items()},
            **{f"{prefix}ib": 1024.0**power for power, prefix in enumerate("kmgt", 1)},
        },
    ),
    "bitops": (
        "{:.4g} BitOps",
        {f"{prefix}{unit}": scale for prefix, scale in _SCALES.items() for unit in ("bitops", "bops")},
    ),
    "latency": ("{:.4g} latency", {}),
}


@dataclass(frozen=True)
class Latency:
    """A budget of measured time.

    Args:
        table: path of a CSV with the columns layer, bits, latency and, on request, input_bits.
        limit: largest sum, in the table's unit.
    """

    table: str | Path
    limit: float


@dataclass(frozen=True)
class Budget:
    """A limit and what it limits.

    Args:
        kind: "bits" (mean width), "compression", "bytes", "bitops" or "latency".
        limit: in bits, as a ratio, in bytes, in bit operations per sample, or in the latency table's unit.
        table: of latencies: by layer, the latency at (bits, input bits); input bits are None where not told.
    """

    kind: Kind
    limit: float
    table: Mapping[str, Mapping[tuple[int, int | None], float]] | None = None

    @property
    def cost_limit(self) -> float:
        """The limit of a cost that grows with widths: mean bits for a compression."""
        return FLOAT_BITS / self.limit if self.kind == "compression" else self.limit

    def show(self, cost: float) -> str:
        """A cost in the budget's own unit.

        >>> parse_budget("8x").show(2.0)
        '16x'
        """
        shown, _ = _KINDS[self.kind]
        return shown.format(FLOAT_BITS / max(cost, 1e-12) if self.kind == "compression" else cost)


def parse_budget(value: object) -> Budget:
    """The budget that a number, a string or a `Latency` stands for; mappings with table and limit are latencies.

    Raises:
        SpecError: if it is none.
        DataError: if a latency table cannot be read.

    >>> parse_budget("1.5MB")
    Budget(kind='bytes', limit=1500000.0, table=None)
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, Mapping) and set(value) == {"table", "limit"}:
        value = Latency(**value)
    if isinstance(value, Latency):
        if not isinstance(value.table, (str, Path)) or isinstance(value.limit, (bool, str, type(None))):
            raise SpecError(f"{value!r} should have the path of a CSV and a number, such as Latency('table.csv', 4.2)")
        return Budget("latency", _positive(value.limit, value), read_latencies(value.table))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Budget("bits", _positive(float(value), value))
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    number = _number(match[1]) if match else None
    if match and number:
        for kind, (_, units) in _KINDS.items():
            if match[2] in units:
                return Budget(kind, number * units[match[2]])
    raise SpecError(
        f"budget={value!r} is not understood; use a mean width such as 3.0, a compression such as '8x', a size such as "
        "'1.5MB', bit operations such as '2.5GBitOps', or Latency('table.csv', 4.2)"
    )


def read_latencies(path: str | Path) -> dict[str, dict[tuple[int, int | None], float]]:
    """Latency by layer and (bits, input bits), from a CSV.

    Raises:
        DataError: if there is no such file, if columns, rows or numbers are missing, or a latency is there twice.
    """
    table: dict[str, dict[tuple[int, int | None], float]] = {}
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        missing = {"layer", "bits", "latency"} - set(names)
        if missing:
            raise DataError(
                f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(sorted(missing))}; a latency "
                "table has the columns layer, bits, latency and, on request, input_bits"
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}, line 1: the column {twice!r} is there twice")
        for row in reader:
            layer, key, latency = _latency(row)
            if key in table.setdefault(layer, {}):
                raise ValueError(f"{layer!r} at these widths is there twice")
            table[layer][key] = latency
    except (ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}, line {reader.line_num}: {error}; bits are integers, latencies numbers") from error
    if not any(latency for rows in table.values() for latency in rows.values()):
        said = "has no rows" if not table else "has no latency above 0"
        raise DataError(f"{path} {said}; a latency table has a row for each layer and width, with the time measured")
    return table


def _latency(row: Mapping[str | None, object]) -> tuple[str, tuple[int, int | None], float]:
    """Layer, widths and latency of a row of a table."""
    if None in row:
        raise ValueError("it has more cells than columns")
    lacking = [name for name in ("layer", "bits", "latency") if row[name] is None]
    if lacking:
        raise ValueError(f"it has no {lacking[0]}")
    given, latency = row.get("input_bits"), float(str(row["latency"]))
    if not math.isfinite(latency) or latency < 0:
        raise ValueError(f"latency {row['latency']!r} is no finite number of 0 or more")
    widths = check_bits(int(str(row["bits"]))), check_bits(int(str(given))) if given else None
    return str(row["layer"]), widths, latency


@dataclass(frozen=True)
class TensorCost:
    """What the widths of a tensor count for.

    Args:
        name: name of its site.
        layer: name of the layer or call it belongs to.
        role: "weight" or "activation".
        numel: number of stored values; 0 for activations, and for weights that are stored in float.
        bits: mean width it has now.
    """

    name: str
    layer: str
    role: Literal["weight", "activation"]
    numel: int
    bits: float


@dataclass(frozen=True)
class Product:
    """A layer or call that multiplies.

    Args:
        layer: its name.
        macs: multiply-accumulates per sample.
        left: name of the tensor on its left, its input; None: float.
        right: name of the tensor on its right, its weight; None: float.
    """

    layer: str
    macs: float
    left: str | None
    right: str | None


@dataclass(frozen=True)
class Costs:
    """What the widths of a model's tensors cost.

    Args:
        tensors: by name.
        products: what multiplies what.
        overhead: size of all that is stored besides codes, in bytes.
    """

    tensors: Mapping[str, TensorCost]
    products: tuple[Product, ...]
    overhead: float

    @classmethod
    def of(cls, model: nn.Module) -> "Costs":
        """Those of a model with quantizers."""
        require_attached(model, "lq.allocate")
        tensors: dict[str, TensorCost] = {}
        products = []
        codes = 0.0

        def add(quantizer: Quantizer | None, role: Literal["weight", "activation"], numel: int = 0) -> str | None:
            if quantizer is None:
                return None
            bits = float(quantizer.bits.detach().mean())
            module, _, place = quantizer.name.rpartition(".")
            layer = Site(module, place, role).layer
            tensors.setdefault(quantizer.name, TensorCost(quantizer.name, layer, role, numel, bits))
            return quantizer.name

        for name, module in quantized_layers(model):
            weight, quantizer, given = float_weight(module), weight_quantizer(module), input_quantizer(module)
            count = 0 if weight is None else weight.numel()
            if quantizer is not None and quantizer.name not in tensors:
                codes += float(quantizer.bits.detach().mean()) * count / 8
            right, left = add(quantizer, "weight", count), add(given, "activation")
            counted = [q.macs for q in (quantizer, given) if q is not None and q.macs is not None]
            products.append(Product(name, counted[0] if counted else 0.0, left, right))
        at_calls = {id(weight.quantizer) for weight in call_weights(model)}
        for weight_of_call in stored_weights(model):
            quantizer, count = (
                weight_of_call.quantizer,
                0 if weight_of_call.source is None else weight_of_call.source.numel,
            )
            codes += float(quantizer.bits.detach().mean()) * count / 8
            add(quantizer, "weight", count)
        for name, operands in calls(model).items():
            named = {
                operand: add(quantizer, "weight" if id(quantizer) in at_calls else "activation")
                for operand, quantizer in operands.items()
            }
            left = next((named[o] for o in named if o in ("input", "left")), None)
            right = next((named[o] for o in named if "weight" in o or o == "right"), None)
            if set(named) != {"output"}:
                products.append(Product(name, next(iter(operands.values())).macs or 0.0, left, right))
        for activation in activation_quantizers(model).values():
            add(activation, "activation")
        return cls(tensors, tuple(products), summary(model).bytes - codes)

    def bits(self, name: str | None) -> float:
        """Mean width that a tensor has now; that of a float if it has no quantizer."""
        return float(FLOAT_BITS) if name is None else self.tensors[name].bits


def _number(text: str) -> float | None:
    try:
        return float(text) or None
    except ValueError:
        return None


def _positive(limit: float, value: object) -> float:
    if not 0 < limit < float("inf"):
        raise SpecError(f"budget={value!r} is not positive; give a limit above 0")
    return limit
