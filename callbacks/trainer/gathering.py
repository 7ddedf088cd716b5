"""Gather what a report shows from the module, the Trainer and the callbacks beside it."""

import datetime
import inspect
import json
import platform
import sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

import lq
from lq.allocation.allocate import allocate
from lq.attachment.sites import is_attached, quantized_layers, weight_quantizer
from lq.attachment.summary import summary
from lq.callbacks.allocate import AllocateBits
from lq.callbacks.compare_to_float import CompareToFloat
from lq.callbacks.export import ExportModel
from lq.callbacks.optimize_ranges import OptimizeRanges
from lq.callbacks.reconstruct import Reconstruct
from lq.errors import BudgetError
from lq.report.html import History, Report
from lq.sensitivity import Sensitivity

# Points of the Pareto front.
_POINTS = 10
_PACKAGES = ("torch", "lightning", "numpy", "timm", "torchvision", "transformers", "onnx", "onnxruntime")


def gather(trainer: pl.Trainer, module: pl.LightningModule, history: History) -> Report:
    """All that is known of a quantized module, but for its accuracy."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    report = Report(type(module).__name__, datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))
    if is_attached(module):
        report.summary = summary(module).to_dict()
        report.channels = _channels(module) or None
    if history.steps or history.metrics:
        report.history = history
    for callback in callbacks:
        if isinstance(callback, AllocateBits):
            _allocation(report, callback, module)
        elif isinstance(callback, Reconstruct) and callback.reconstruction is not None:
            report.reconstruction = [*(report.reconstruction or []), asdict(callback.reconstruction)]
        elif isinstance(callback, OptimizeRanges) and callback.optimized is not None:
            report.ranges = asdict(callback.optimized)
        elif isinstance(callback, CompareToFloat) and callback.comparison is not None:
            report.comparison = json.loads(callback.comparison.to_json())
        elif isinstance(callback, ExportModel) and Path(callback.path).is_file():
            size = Path(callback.path).stat().st_size
            report.files = [*(report.files or []), {"path": str(callback.path), "bytes": size}]
    report.settings = _settings(callbacks)
    report.environment = _environment(trainer)
    return report


def _channels(module: nn.Module) -> dict[str, dict[str, int]]:
    """Numbers of channels by width, of the weights where they differ."""
    found = {}
    for name, layer in quantized_layers(module):
        quantizer = weight_quantizer(layer)
        widths = [] if quantizer is None else quantizer.bits.detach().reshape(-1).round().int().tolist()
        if len(set(widths)) > 1:
            found[name] = {str(width): count for width, count in sorted(Counter(widths).items())}
    return found


def _allocation(report: Report, callback: AllocateBits, module: nn.Module) -> None:
    table, chosen = callback.sensitivity_table, callback.allocated
    if table is not None:
        report.sensitivity = {
            "metric": table.metric,
            "widths": list(table.widths),
            "samples": table.samples,
            "losses": {tensor.name: tensor.loss.tolist() for tensor in table.tensors},
        }
        report.pareto = _front(callback, module, table)
    if chosen is not None:
        costs = {f"cost, {name}": cost for name, cost in chosen.costs.items()}
        report.allocation = {"metric": chosen.metric, "solver": chosen.solver, "expected loss": f"{chosen.loss:.4g}"}
        report.allocation |= {"least possible": f"{chosen.bound:.4g}", **costs}
        if report.pareto and report.summary is not None:
            report.chosen = [report.summary["average_bits"], chosen.loss]


def _front(callback: AllocateBits, module: nn.Module, table: Sensitivity) -> list[list[float]] | None:
    """Mean bits and loss of allocations at rising mean widths, by the choices of the callback; weights alone."""
    if callback.activations is not None or callback.layer_memory is not None:
        return None  # another loss than that of the weights
    known = [width for width in (callback.bits or table.widths) if width in table.widths]
    found = []
    for mean in np.linspace(min(known), max(known), _POINTS + 2)[1:-1]:
        try:
            one = allocate(
                module, table, float(mean), bits=callback.bits, granularity=callback.granularity, pins=callback.pins
            )
        except BudgetError:  # pins may leave no room there
            continue
        if one.loss > 0:
            found.append([float(mean), float(one.loss)])
    return found or None


def _settings(callbacks: list[pl.Callback]) -> dict[str, dict[str, str]]:
    """The arguments of lq's callbacks that are not the default."""
    found: dict[str, dict[str, str]] = {}
    for callback in callbacks:
        if not type(callback).__module__.startswith("lq.callbacks"):
            continue
        name = type(callback).__name__
        name = name if name not in found else f"{name} ({sum(n.startswith(name) for n in found) + 1})"
        found[name] = {
            argument: repr(getattr(callback, argument))
            for argument in inspect.signature(type(callback)).parameters
            if hasattr(callback, argument)
        }
    return found


def _environment(trainer: pl.Trainer) -> dict[str, str]:
    """Versions of what is loaded, and the machine."""
    found = {"lq": lq.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        if package in sys.modules:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
    device = trainer.strategy.root_device
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found["processes"] = str(trainer.world_size)
    found["precision"] = str(trainer.precision)
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["steps"] = f"{trainer.global_step} in {trainer.current_epoch} epochs"
    return found
