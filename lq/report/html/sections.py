"""The sections of a page: each shows one part of a report, or says what would give it."""

from collections.abc import Callable, Sequence
from typing import Any

from lq.report.comparison.closeness import EQUAL
from lq.report.html.charts import Points, columns, heat_map, lines
from lq.report.html.data import History, Report
from lq.report.html.parts import card, cards, folded, pairs, paragraph, table, tile
from lq.tables import amount

# SQNR in charts goes up to this, in dB.
_MOST = 60.0
_EACH = "Each tensor counts once, whatever its size."
# Lines in one chart of single quantizers.
_SINGLE = 4


def overview(report: Report) -> str:
    """The most important numbers."""
    found = []
    accuracy, size = report.accuracy or {}, report.summary
    if "final" in accuracy:
        found.append(tile(f"{100 * accuracy['final']:.2f} %", "accuracy, quantized"))
    if "float" in accuracy:
        found.append(tile(f"{100 * accuracy['float']:.2f} %", "accuracy, float"))
    if size is not None:
        found.append(tile(amount(size["bytes"], "B"), f"stored, of {amount(size['float_bytes'], 'B')} in float"))
        found.append(tile(f"{size['compression']:.2f}\u00d7", "smaller than float"))
        found.append(tile(f"{size['average_bits']:.2f}", "bits per quantized weight"))
        if size["bitops"] is not None:
            found.append(tile(amount(size["bitops"], ""), "bit operations per sample"))
    network = None if report.comparison is None else report.comparison["network"]
    if network is not None:
        found.append(tile(_decibels(network), "SQNR of the network's output"))
    return f'<div class="tiles">{"".join(found)}</div>' if found else ""


def accuracy(report: Report) -> str:
    """Accuracy before and after, and what validation logged."""
    parts = []
    if report.accuracy:
        names = {"float": "float", "calibrated": "quantized, before training", "final": "quantized, in the end"}
        rows = [(names.get(key, key), f"{100 * value:.2f} %") for key, value in report.accuracy.items()]
        said = paragraph(f"Share of right classes on {report.accuracy_samples} validation samples.", muted=True)
        parts.append(card("Before and after", table(("network", "accuracy"), rows, numbers=(1,)) + said))
    history = report.history
    if history is not None:
        names_of = sorted({name for row in history.metrics for name in row} - {"step", "epoch"})
        for name in names_of[:12]:
            points: Points = [(row["step"], row[name]) for row in history.metrics if row.get(name) is not None]
            parts.append(card(name, lines({name: points}, below="step", marked=len(points) < 40)))
    return cards(*parts)


def bits(report: Report) -> str:
    """Widths and sizes of layers."""
    if report.summary is None:
        return ""
    layers = report.summary["layers"]
    titles = [
        f"{layer['name']}: {layer['average_bits']:.2f} bits, input {layer['input_bits'] or 'float'}" for layer in layers
    ]
    widths = [0.0 if layer["average_bits"] >= 32 else layer["average_bits"] for layer in layers]
    chart = columns(widths, titles, dots=[layer["input_bits"] for layer in layers], label="bits")
    sizes = columns(
        [layer["bytes"] / 1000 for layer in layers],
        [f"{layer['name']}: {amount(layer['bytes'], 'B')}" for layer in layers],
        label="kB",
    )
    header = ("layer", "kind", "weight", "bits", "input", "size", "bit ops")
    rows = [
        (
            layer["name"] or "(model)",
            layer["kind"],
            "\u00d7".join(map(str, layer["shape"])),
            "/".join(map(str, layer["weight_bits"])) or "float",
            "float" if layer["input_bits"] is None else str(layer["input_bits"]),
            amount(layer["bytes"], "B"),
            "\u2013" if layer["bitops"] is None else amount(layer["bitops"], ""),
        )
        for layer in layers
    ]
    parts = [
        card("Bits by layer", chart, "Columns: mean width of the weight. Dots: width of its input."),
        card("Size by layer", sizes),
    ]
    text = cards(*parts)
    if report.channels:
        text += folded(
            f"Widths of channels, by layer, where they differ: {len(report.channels)}", _channels(report.channels)
        )
    return text + table(header, rows, numbers=(5, 6))


def _channels(channels: dict[str, dict[str, int]]) -> str:
    known = sorted({int(width) for counts in channels.values() for width in counts})
    rows = [
        (name, *(str(counts.get(str(width), 0) or "\u2013") for width in known)) for name, counts in channels.items()
    ]
    return table(("layer", *(f"{width} bits" for width in known)), rows, numbers=range(1, len(known) + 1))


def sensitivity(report: Report) -> str:
    """What each width of each tensor costs, and what was chosen."""
    found = report.sensitivity
    parts = []
    if found is not None:
        rows = list(found["losses"].items())
        labels = [f"{width}b" for width in found["widths"]]
        note = f"{found['metric']} on {found['samples']} samples; the bluer, the more is lost, "
        note += "from the least to the greatest loss below. "
        note += "First layer on top."
        parts.append(card("Sensitivity", heat_map(rows, labels, "tensors"), note))
    if report.pareto:
        series: dict[str, Points] = {"front": [(bits, loss) for bits, loss in report.pareto]}
        if report.chosen:
            series["chosen"] = [(report.chosen[0], report.chosen[1])]
        chart = lines(series, log=True, label="expected loss", below="mean bits of weights", marked=True)
        parts.append(card("Pareto front", chart, "The least expected loss at each mean width of weights."))
    text = cards(*parts)
    if report.allocation is not None:
        text += pairs({key: str(value) for key, value in report.allocation.items()})
    if found is not None:
        rows_of_table = [(name, *(f"{value:.2e}" for value in losses)) for name, losses in found["losses"].items()]
        header = ("tensor", *(f"{width} bits" for width in found["widths"]))
        text += folded("Sensitivities as numbers", table(header, rows_of_table, numbers=range(1, len(header))))
    return text


def reconstruction(report: Report) -> str:
    """Losses of units before and after."""
    text = ""
    for number, one in enumerate(report.reconstruction or (), 1):
        units = one["units"]
        series: dict[str, Points] = {
            "nearest rounding": [(i + 1, unit["before"]) for i, unit in enumerate(units)],
            "reconstructed": [(i + 1, unit["after"]) for i, unit in enumerate(units)],
        }
        title = "Loss by unit" + (f", reconstruction {number}" if len(report.reconstruction or ()) > 1 else "")
        chart = card(title, lines(series, log=True, label="loss", below="unit", marked=len(units) < 60))
        rows = [
            (
                unit["name"],
                f"{unit['before']:.3g}",
                f"{unit['after']:.3g}",
                str(unit["iterations"]),
                f"{unit['seconds']:.0f}",
            )
            for unit in units
        ]
        text += cards(chart) + table(("unit", "before", "after", "steps", "seconds"), rows, numbers=(1, 2, 3, 4))
    if report.ranges is not None:
        text += paragraph(
            f"Ranges chosen by the loss of the network: {report.ranges['before']:.4g} before, "
            f"{report.ranges['after']:.4g} after, {report.ranges['evaluations']} evaluations."
        )
    return text


def training(report: Report) -> str:
    """What moved while training."""
    history = report.history
    if history is None or not history.steps:
        return ""
    steps = history.steps
    parts = [
        card("Learning rates", lines(_series(steps, history.rates), label="rate", below="step")),
        card("Mean widths of tensors", lines(_series(steps, history.bits), label="bits", below="step"), _EACH),
        card("\u03b1: steps of quantizers", _alpha(history), "Change of log2 of the step since the first note."),
        card("Widths of single tensors", _widths(history)),
    ]
    text = cards(*parts)
    return text + _oscillation(history)


def _series(steps: Sequence[int], values: dict[str, list[float]]) -> dict[str, Points]:
    return {name: list(zip(map(float, steps), line, strict=True)) for name, line in values.items()}


def _alpha(history: History) -> str:
    """The middle of all quantizers, and those that moved most."""
    moved = [[_minus(now, first) for now, first in zip(row, history.alpha[0], strict=True)] for row in history.alpha]
    most = sorted(range(len(history.names)), key=lambda i: -abs(moved[-1][i] or 0.0))[:_SINGLE]
    series = {"median": [_middle(row) for row in moved]} | {
        history.names[i]: [row[i] for row in moved] for i in most if moved[-1][i]
    }
    points: dict[str, Points] = {name: list(zip(history.steps, line, strict=True)) for name, line in series.items()}
    return lines(points, label="change of log2", below="step")


def _minus(now: float | None, first: float | None) -> float | None:
    return None if now is None or first is None else now - first


def _middle(row: Sequence[float | None]) -> float | None:
    known = sorted(value for value in row if value is not None)
    return known[len(known) // 2] if known else None


def _widths(history: History) -> str:
    changed = [i for i in range(len(history.names)) if len({row[i] for row in history.widths}) > 1]
    changed.sort(key=lambda i: history.widths[-1][i])
    series = {history.names[i]: [row[i] for row in history.widths] for i in changed[: _SINGLE + 1]}
    return lines(_series(history.steps, series), label="bits", below="step") if series else ""


def _oscillation(history: History) -> str:
    """Weights whose codes still change at the end."""
    if not history.changed or len(history.steps) < 2:
        return ""
    last = max(len(history.steps) // 4, 1)
    rows = sorted(((sum(line[-last:]) / last, name) for name, line in history.changed.items()), reverse=True)
    mean = [sum(line[i] for line in history.changed.values()) / len(history.changed) for i in range(len(history.steps))]
    points: Points = list(zip(history.steps, [100 * value for value in mean], strict=True))[1:]
    chart = card(
        "Oscillation: codes that change",
        lines({"mean of all weights": points}, label="% of codes", below="step"),
        "Share of integer codes that are others than at the note before.",
    )
    cells = [(name, f"{100 * share:.2f} %") for share, name in rows]
    listed = card("In the last quarter", table(("weight", "changed"), cells[:10], numbers=(1,)))
    rest = folded("All weights", table(("weight", "changed"), cells, numbers=(1,))) if len(cells) > 10 else ""
    return cards(chart, listed) + rest


def comparison(report: Report) -> str:
    """Layers against their float twins."""
    found = report.comparison
    if found is None:
        return ""
    order = sorted(found["layers"], key=lambda layer: layer["index"])
    series: dict[str, Points] = {
        label: [
            (place + 1, min(layer[key]["sqnr"], _MOST)) for place, layer in enumerate(order) if layer[key] is not None
        ]
        for key, label in (("alone", "alone"), ("together", "with all before it"))
    }
    chart = lines(series, label="SQNR (dB)", below="layer, in the order of the model")
    header = ("layer", "kind", "bits", "alone dB", "cosine", "KL", "with dB", "cosine", "KL", "try next")
    rows = [
        (
            layer["name"] or "(model)",
            layer["kind"],
            " ".join(f"{'W' if part['is_weight'] else 'A'}{part['bits']:.3g}" for part in layer["parts"]),
            *_closeness(layer["alone"]),
            *_closeness(layer["together"]),
            layer["advice"] or "\u2013",
        )
        for layer in found["layers"]
    ]
    notes = "".join(paragraph(note, muted=True) for note in found["notes"])
    note = f"On {found['samples']} samples. 20 dB: an error of a tenth; one bit is about 6 dB. Worst layers first."
    return (
        cards(card("Quantized against float", chart))
        + paragraph(note, muted=True)
        + table(header, rows, numbers=range(3, 9), wide=9)
        + notes
    )


def _closeness(found: dict[str, Any] | None) -> tuple[str, str, str]:
    if found is None:
        return "\u2013", "\u2013", "\u2013"
    return _decibels(found).removesuffix(" dB"), f"{found['cosine']:.4f}", f"{found['kl']:.2g}"


def _decibels(found: dict[str, Any]) -> str:
    return "equal" if found["sqnr"] >= EQUAL else f"{found['sqnr']:.1f} dB"


def files(report: Report) -> str:
    """What was exported."""
    if not report.files:
        return ""
    rows = [(one["path"], amount(one["bytes"], "B")) for one in report.files]
    return table(("file", "size"), rows, numbers=(1,))


def settings(report: Report) -> str:
    """Callbacks, versions, machine."""
    text = cards(card("Environment", pairs(report.environment))) if report.environment else ""
    return text + "".join(folded(name, pairs(values)) for name, values in report.settings.items())


#: Title of each section, what makes it, and what would give it.
SECTIONS: tuple[tuple[str, Callable[[Report], str], str], ...] = (
    ("Accuracy", accuracy, "give the Trainer validation data with classes, or log metrics in validation_step"),
    ("Bits and size", bits, "quantize the model: list Quantize among the callbacks"),
    ("Sensitivity and allocation", sensitivity, "list AllocateBits among the callbacks"),
    ("Reconstruction", reconstruction, "list Reconstruct (or OptimizeRanges) among the callbacks"),
    ("Training", training, "train: max_epochs above 0, with FineTune or LearnNoiseScale"),
    ("Layer by layer", comparison, "list CompareToFloat among the callbacks"),
    ("Files", files, "list ExportModel among the callbacks"),
    ("Settings and environment", settings, "write the report from the callback ReportQuantization"),
)
