"""What a comparison found: a row for each layer, worst first; as a table, CSV, JSON and a plot."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lq.errors import DataError
from lq.files import parse_json, schema, whole_file
from lq.report.comparison.closeness import EQUAL, Closeness
from lq.tables import Table


@dataclass(frozen=True)
class Part:
    """A weight or an activation of a layer that is rounded.

    Args:
        name: name of its site, such as "layer1.0.conv1.weight".
        is_weight: whether it is a weight.
        bits: its width; the mean over channels.
        sqnr: of the tensor itself, float values rounded, in dB.
        clipped: share of the squared error from values beyond the range.
        range: the rule that found the range; "" if only its state is known.
        per_channel: whether it has a step for each channel.
        heads: largest over smallest range among attention heads; None: it has none.
        beyond: how far float values go beyond those that calibration saw, as a factor; 1: they do not.
    """

    name: str
    is_weight: bool
    bits: float
    sqnr: float
    clipped: float
    range: str
    per_channel: bool
    heads: float | None = None
    beyond: float = 1.0


@dataclass(frozen=True)
class LayerComparison:
    """One layer, call or rounded result.

    Args:
        name: its name in the model.
        kind: its class ("Conv2d"), kind of call ("matmul"), or "result".
        index: its place in the order of the model.
        calls: how often it was run.
        parts: what is rounded in it.
        alone: its output, it alone quantized and its input in float; None: not to be had.
        together: its output with all before it quantized, too; None: it was not reached.
        advice: what to try next; empty: nothing.
    """

    name: str
    kind: str
    index: int
    calls: int
    parts: tuple[Part, ...]
    alone: Closeness | None
    together: Closeness | None
    advice: str = ""

    @property
    def bits(self) -> str:
        """The widths of its parts, in bits, such as "W4 A8"."""
        return " ".join(f"{'W' if part.is_weight else 'A'}{part.bits:.3g}" for part in self.parts)


@dataclass(frozen=True)
class Comparison:
    """A quantized network compared with the float one; ``print`` shows it as a table.

    Args:
        layers: its layers, the one that by itself loses most first.
        network: the output of the whole network; None: the forward returns no tensor.
        samples: number of samples it was compared on.
        notes: what did not take part, and why.
    """

    layers: tuple[LayerComparison, ...]
    network: Closeness | None
    samples: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerComparison:
        """The layer of that name.

        Raises:
            DataError: if there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise DataError(
            f"{name!r} was not compared; compared were {', '.join(layer.name for layer in self.layers[:5])}, ... "
            f"({len(self.layers)} layers)"
        )

    def table(self, most: int | None = None) -> Table:
        """The layers, worst first, ready to be shown; `most` of them."""
        shown = self.layers[:most]
        rows = tuple(
            (
                layer.name or "(model)",
                layer.kind,
                layer.bits,
                *_cells(layer.alone),
                *_cells(layer.together),
                layer.advice or "-",
            )
            for layer in shown
        )
        notes = [f"{self.samples} samples; alone: one layer quantized, its input in float; with: all before it, too"]
        if self.network is not None:
            sqnr, cosine, kl = _cells(self.network)
            notes.append(f"network output: SQNR {sqnr} dB, cosine {cosine}, KL {kl}")
        if len(shown) < len(self.layers):
            notes.append(f"{len(self.layers) - len(shown)} more layers that lose less")
        header = ("layer", "kind", "bits", "alone dB", "cosine", "KL", "with dB", "cosine", "KL", "try next")
        return Table(header, rows, (*notes, *self.notes))

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each layer, worst first.

        Raises:
            WriteError: if the file cannot be written.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        measures = ("sqnr", "cosine", "kl")
        header = [f"{when}_{measure}" for when in ("alone", "together") for measure in measures]
        writer.writerow(["layer", "kind", "bits", "calls", *header, "worst_part", "worst_part_sqnr", "try_next"])
        for layer in self.layers:
            found = [value for one in (layer.alone, layer.together) for value in _values(one)]
            worst = min(layer.parts, key=lambda part: part.sqnr, default=None)
            part = ("", "") if worst is None else (worst.name, f"{worst.sqnr:.3f}")
            writer.writerow([layer.name, layer.kind, layer.bits, layer.calls, *found, *part, layer.advice])
        _write(path, text.getvalue())

    def to_json(self, path: str | Path | None = None) -> str:
        """The comparison as JSON; written to `path`, too, if one is given.

        Raises:
            WriteError: if the file cannot be written.
        """
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            _write(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """The inverse of `to_json`.

        Raises:
            DataError: if `text` is something else.
        """
        try:
            values = schema.read(parse_json(text), _COMPARISON)
        except DataError as error:
            raise DataError(f"not a saved comparison: {error}; write comparison.to_json() to the file") from error
        return cls(**values)

    def plot(self, path: str | Path) -> None:
        """Draw the SQNR of all layers, in the order of the model, into an image file; needs matplotlib."""
        self.figure().savefig(path)

    def figure(self) -> Any:
        """The plot as a figure of matplotlib."""
        from matplotlib.figure import Figure

        layers = sorted(self.layers, key=lambda layer: layer.index)
        figure = Figure(figsize=(max(6.0, 0.18 * len(layers) + 2), 4.5), layout="constrained")
        axes = figure.subplots()
        for label, style in (("alone", "o-"), ("together", "s--")):
            found = [(i, getattr(layer, label)) for i, layer in enumerate(layers)]
            points = [(i, min(one.sqnr, 60.0)) for i, one in found if one is not None]
            named = "alone" if label == "alone" else "with all before it"
            axes.plot([i for i, _ in points], [y for _, y in points], style, markersize=4, label=named)
        names = [layer.name for layer in layers]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
        axes.set_ylabel("SQNR (dB)")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def _cells(found: Closeness | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    return "equal" if found.sqnr >= EQUAL else f"{found.sqnr:.1f}", f"{found.cosine:.4f}", f"{found.kl:.2g}"


def _values(found: Closeness | None) -> list[str]:
    return ["", "", ""] if found is None else [f"{found.sqnr:.3f}", f"{found.cosine:.6f}", f"{found.kl:.6g}"]


def _write(path: str | Path, text: str) -> None:
    with whole_file(Path(path)) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


# What a saved comparison looks like.
def _record(fields: dict[str, schema.Check], into: type) -> schema.Check:
    check = schema.record(fields)
    return lambda value: into(**check(value))


_CLOSENESS = schema.optional(
    _record({"sqnr": schema.number(), "cosine": schema.number(), "kl": schema.number(0)}, Closeness)
)
_PART = _record(
    {
        "name": schema.text,
        "is_weight": schema.boolean,
        "bits": schema.number(0),
        "sqnr": schema.number(),
        "clipped": schema.number(0),
        "range": schema.text,
        "per_channel": schema.boolean,
        "heads": schema.optional(schema.number(0)),
        "beyond": schema.number(1),
    },
    Part,
)
_LAYER = _record(
    {
        "name": schema.text,
        "kind": schema.text,
        "index": schema.integer(),
        "calls": schema.integer(),
        "parts": schema.array(_PART, into=tuple),
        "alone": _CLOSENESS,
        "together": _CLOSENESS,
        "advice": schema.text,
    },
    LayerComparison,
)
_COMPARISON = schema.record(
    {
        "layers": schema.array(_LAYER, into=tuple),
        "network": _CLOSENESS,
        "samples": schema.integer(),
        "notes": schema.array(schema.text, into=tuple),
    }
)
