"""Figures of a report for loggers that take them: widths, losses by unit, the Pareto front, what moved in training."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lq.report.html import Report


def figures_of(report: Report) -> dict[str, Callable[[], Any]]:
    """What draws each figure that a report has values for, by name; needs matplotlib when it is called."""
    drawn: dict[str, Callable[[], Any]] = {}
    if report.summary is not None:
        drawn["bits"] = partial(_bits, report.summary["layers"])
    if report.pareto:
        drawn["pareto"] = partial(_pareto, report.pareto, report.chosen)
    history = report.history
    if history is not None and len(history.steps) > 1:
        for name, title, series in (
            ("rates", "learning rate", history.rates),
            ("widths", "mean bits", history.bits),
            ("changed", "share of codes that changed", history.changed),
        ):
            if series:
                first = 1 if name == "changed" else 0  # nothing is before the first note
                drawn[name] = partial(_lines, history.steps[first:], {k: v[first:] for k, v in series.items()}, title)
    return drawn


def _bits(layers: list[dict[str, Any]]) -> Any:
    figure, axes = _axes(max(6.0, 0.18 * len(layers) + 2))
    axes.bar(range(len(layers)), [min(layer["average_bits"], 32.0) for layer in layers], label="weight")
    found = [(i, layer["input_bits"]) for i, layer in enumerate(layers) if layer["input_bits"] is not None]
    axes.plot([i for i, _ in found], [width for _, width in found], "o", color="tab:orange", label="input")
    axes.set_xticks(range(len(layers)), [layer["name"] for layer in layers], rotation=90, fontsize="x-small")
    axes.set_ylabel("bits")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _pareto(front: list[list[float]], chosen: list[float] | None) -> Any:
    figure, axes = _axes()
    axes.plot([bits for bits, _ in front], [loss for _, loss in front], "o-", label="least loss")
    if chosen is not None:
        axes.plot(*([value] for value in chosen), "*", markersize=12, label="chosen")
    axes.set_yscale("log")
    axes.set_xlabel("mean bits of weights")
    axes.set_ylabel("expected loss")
    axes.legend()
    return figure


def _lines(steps: list[int], series: dict[str, list[float]], title: str) -> Any:
    figure, axes = _axes()
    greatest = sorted(series, key=lambda name: -sum(series[name]))[:_NAMED]
    for name in sorted(series, key=lambda name: name in greatest):  # the others are behind them
        of_line = {"label": name} if name in greatest else {"color": "0.8", "linewidth": 0.8}
        axes.plot(steps[-len(series[name]) :], series[name], **of_line)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    axes.legend(fontsize="x-small")
    return figure


# Lines that still have room in a legend; those with the greatest values.
_NAMED = 12


def _axes(width: float = 6.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    return figure, figure.subplots()
