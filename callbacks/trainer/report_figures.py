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
                drawn[name] = partial(_lines, history.steps, series, title)
    return drawn


def _bits(layers: list[dict[str, Any]]) -> Any:
    figure, axes = _axes(max(6.0, 0.18 * len(layers) + 2))
    axes.bar(range(len(layers)), [min(layer["average_bits"], 32.0) for layer in layers], label="weight")
    found = [(i, layer["input_bits"]) for i, layer in enumerate(layers) if layer["input_bits"] is not None]
    axes.plot([i for i, _ in found], [width for _, width in found], "o", color="tab:orange", label="input")
    axes.set_xticks(range(len(layers)), [layer["name"] for layer in layers], rotation=90, fontsize="x-small")
    axes.set_ylabel("bits")
    axes.legend()
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
    for name, values in series.items():
        axes.plot(steps[-len(values) :], values, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    if len(series) <= _NAMED:
        axes.legend(fontsize="x-small")
    return figure


# Lines that still have room in a legend.
_NAMED = 12


def _axes(width: float = 6.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    return figure, figure.subplots()
