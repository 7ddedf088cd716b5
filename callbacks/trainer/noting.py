"""Notes of what moves while training: rates, steps and widths of quantizers, codes that change, logged metrics."""

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lq.attachment.sites import float_weight, quantized_layers, quantizers, weight_quantizer
from lq.quantizer.quantizer import Quantizer
from lq.report.html import History

# Notes that are kept.
_MOST = 200
# Weights of larger models are not looked at code by code.
_VALUES = 200_000_000


class Notes:
    """A history that is written step by step, and thinned when it is long.

    Args:
        history: one to go on with.
    """

    def __init__(self, history: History | None = None) -> None:
        self.history = History() if history is None else history
        self._stride = 1
        self._codes: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, trainer: pl.Trainer, module: nn.Module, every: int) -> None:
        """Note the state, if it is time to."""
        history, step = self.history, trainer.global_step
        last = history.steps[-1] if history.steps else -math.inf
        if step - last < every * self._stride:
            return
        found = list(quantizers(module))
        names = [q.name for q in found]
        if history.names and names != history.names:  # of a run with other quantizers
            self.history = history = History(metrics=history.metrics)
        history.names = names
        history.steps.append(step)
        rates = {
            f"optimizer {i + 1}" if len(trainer.optimizers) > 1 else "optimizer": float(optimizer.param_groups[0]["lr"])
            for i, optimizer in enumerate(trainer.optimizers)
        }
        _append(history.rates, rates, len(history.steps))
        alpha, widths = _means(found, "log2_step"), _means(found, "bits")
        history.alpha.append(alpha)
        history.widths.append([0.0 if width is None else width for width in widths])
        for kind, chosen in (("weights", True), ("activations", False)):
            of_kind = [w for q, w in zip(found, widths, strict=True) if q.is_weight == chosen and w is not None]
            if of_kind:
                _append(history.bits, {kind: sum(of_kind) / len(of_kind)}, len(history.steps))
        _append(history.changed, self._changed(module), len(history.steps))
        if len(history.steps) > _MOST:
            history.thin()
            self._stride *= 2

    def metrics(self, trainer: pl.Trainer) -> None:
        """Note what was logged."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        step = float(trainer.global_step)
        if found and not (self.history.metrics and self.history.metrics[-1]["step"] == step):
            self.history.metrics.append({"step": step, "epoch": float(trainer.current_epoch), **found})
        if len(self.history.metrics) > _MOST:
            self.history.metrics = self.history.metrics[1::2]

    def _changed(self, module: nn.Module) -> dict[str, float]:
        """Share of the codes of each weight that are others than at the last note."""
        layers = [(name, layer) for name, layer in quantized_layers(module) if weight_quantizer(layer) is not None]
        weights = {name: weight for name, layer in layers if (weight := float_weight(layer)) is not None}
        if sum(weight.numel() for weight in weights.values()) > _VALUES:
            return {}
        found = {}
        for name, layer in layers:
            quantizer = weight_quantizer(layer)
            if quantizer is None or name not in weights or not quantizer.calibrated:
                continue
            layout, rounded = quantizer.layout, quantizer._quantize(weights[name].detach())
            step = quantizer.step.detach()
            step = layout.spread(step, rounded) if step.numel() > 1 else step
            codes = (layout.split(rounded).float() / step).round().to(torch.int16)
            before = self._codes.get(name)
            found[name] = 0.0
            if before is not None and before.shape == codes.shape:
                found[name] = float((codes != before).float().mean())
            self._codes[name] = codes
        return found


def _append(series: dict[str, list[float]], values: dict[str, float], length: int) -> None:
    """Add a value to each series; those that begin later begin with it, those that have ended stay as they are."""
    for name in series.keys() | values.keys():
        line = series.setdefault(name, [])
        value = values.get(name, line[-1] if line else 0.0)
        line.extend([value] * (length - len(line)))


def _means(found: list[Quantizer], part: str) -> list[float | None]:
    """The mean of a part of each quantizer; None where it is not finite. The device is waited for once."""
    if not found:
        return []
    means = torch.stack([getattr(q, part).detach().float().mean() for q in found]).cpu().tolist()
    return [mean if math.isfinite(mean) else None for mean in means]
