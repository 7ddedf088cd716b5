"""Find the ranges of all quantizers: of weights from their values, of activations from batches.

One pass over the data: while a model is observed its weights are quantized and its activations pass through, counted in
a histogram per site (memory independent of the number of images). `Histogram` is exact over batches and ranks, so
that two ranks find the ranges one rank finds on the same images.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lq.attachment.cost import count_macs
from lq.attachment.interception import call_quantizers
from lq.attachment.sites import (
    activation_quantizers,
    calls,
    float_weight,
    input_quantizer,
    quantized_layers,
    quantizers,
    require_attached,
    weight_quantizer,
    weights_at_calls,
)
from lq.attachment.stored import find_range
from lq.bars import steps
from lq.calibration.output_ranges import SAMPLES, by_output, fit_to_outputs
from lq.errors import DataError, NoEffectWarning
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.histogram import Histogram, Reduce
from lq.quantizer.unreached import mark_unreached
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.forward import Forward, describe, eval_mode, run
from lq.structure.recomputation import without_recomputation
from lq.structure.samples import batch_size

M = TypeVar("M", bound=nn.Module)

__all__ = ["Forward", "calibrate", "calibrate_weights", "describe", "eval_mode", "needs_calibration", "run"]


def calibrate(
    model: M,
    batches: Iterable[Any] = (),
    *,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
) -> M:
    """Find the ranges of the quantizers of `model`, in place; what was learned of them is overwritten.

    Args:
        model: a model with quantizers; runs in eval mode, its own modes are restored.
        batches: any iterable of batches, read once. Labels are not used. Not needed if only weights are quantized.
        forward: called with the model and a batch. By default the model is called with the batch, or with the first
            part of a tuple or list; of a mapping (or dataclass), with the parts that its forward has parameters of the
            same name for, or with the mapping as its only argument (`lq.structure.forward`).
        reduce: combines a tensor over ranks: called with it and "sum", "min" or "max".

    Returns:
        The model.

    Raises:
        StateError: if the model has no quantizers.
        DataError: if there are no batches, the model does not take one, or a tensor in it has NaN or Inf.

    >>> import lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), weights=4, activations=8)
    >>> model = calibrate(model, [torch.randn(32, 4)])
    >>> model(torch.randn(1, 4)).shape
    torch.Size([1, 2])
    """
    require_attached(model, "lq.calibrate")
    calibrate_weights(model)
    sites = activation_quantizers(model)
    if not sites and not needs_calibration(model) and not any(map(by_output, quantizers(model))):
        return model
    with eval_mode(model), without_recomputation(model), torch.no_grad():
        try:
            observed = {name: site.observe() for name, site in sites.items()}
            seen = 0
            some = _Some() if any(map(by_output, quantizers(model))) else None
            for batch in steps(batches, "Calibrating"):
                if some is not None:
                    some.add(batch)
                if seen == 0:
                    _record_macs(model, batch, forward)
                else:
                    run(model, batch, forward)
                seen += 1
        finally:
            for site in sites.values():
                site.tap = None
    if not seen:
        raise DataError("calibration got no batches: the loader is empty; give lq.calibrate at least one batch")
    _set_ranges(model, sites, observed, reduce)
    if some is not None:
        fit_to_outputs(model, some.batches, forward, reduce)
    return model


class _Some:
    """The first batches, until they have as many samples as ranges by the output want."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.samples = 0

    def add(self, batch: Any) -> None:
        if self.samples < SAMPLES:
            self.batches.append(batch)
            self.samples += batch_size(batch)


def _set_ranges(
    model: nn.Module,
    sites: Mapping[str, ActivationQuantizer],
    observed: Mapping[str, Histogram],
    reduce: Reduce | None,
) -> None:
    """Give activations the ranges of what was observed; mark those where nothing was, and say so."""
    unseen, kept, wider = [], [], []
    for name, site in sites.items():
        histogram = observed[name]
        if reduce is not None:
            histogram.reduce(reduce, site.bits.device)
        if histogram.counts is not None:
            width = float(site.bits.detach())
            site.calibrate(histogram)
            wider += [name] if float(site.bits.detach()) > width else []
        elif site.calibrated:
            kept.append(name)
        else:
            unseen.append(name)
            mark_unreached(site)
    for at_call in weights_at_calls(model):
        if not at_call.calibrated:
            mark_unreached(at_call)  # its range is found at the first use
    if wider:
        warnings.warn(
            f"{len(wider)} of {len(sites)} activations got {sites[wider[0]].spec.outliers} bits ({_few(wider)}): few "  # type: ignore[union-attr]
            "values there are far larger than the others (outliers=)",
            stacklevel=3,
        )
    if unseen:
        later = "they stay float" if reduce is not None else "in training each takes the range of the first values"
        warnings.warn(
            f"{len(unseen)} of {len(sites)} activations were never seen in calibration ({_few(unseen)}): no batch took "
            f"the model there in eval mode. They are not quantized; {later}. Calibrate on more batches, or with a "
            "forward= that goes there, or leave them out with exclude=. If the model uses weights without calling "
            "their layers, it has to be looked at: structure=lq.inspect(model, example)",
            NoEffectWarning,
            stacklevel=3,
        )
    if kept:
        warnings.warn(
            f"{len(kept)} of {len(sites)} activations were never seen in calibration ({_few(kept)}): they keep the "
            "range that they had",
            NoEffectWarning,
            stacklevel=3,
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def calibrate_weights(model: nn.Module) -> None:
    """Find the ranges of all weights from the values they have now; of those that calls compute, at the next call."""
    for module in model.modules():
        for at_call in call_quantizers(module).values():
            if isinstance(at_call, WeightQuantizer) and not find_range(at_call, module):
                at_call.forget_range()
    for _, module in quantized_layers(model):
        quantizer, weight = weight_quantizer(module), float_weight(module)
        if quantizer is not None and weight is not None:
            quantizer.calibrate(weight)


def needs_calibration(model: nn.Module) -> bool:
    """Whether a quantizer of `model` has no range yet, other than because calibration did not come there."""
    return any(not (quantizer.calibrated or quantizer.unreached) for quantizer in quantizers(model))


def _record_macs(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Run the first batch and note on each quantizer how much work its layer does per sample."""
    macs = count_macs(model, lambda: run(model, batch, forward), batch_size(batch))
    for name, module in quantized_layers(model):
        for quantizer in (weight_quantizer(module), input_quantizer(module)):
            if quantizer is not None:
                quantizer.macs = macs.get(name)
    for name, quantizers_of_call in calls(model).items():
        for at_call in quantizers_of_call.values():
            at_call.macs = macs.get(name)
