"""Find the ranges of all quantizers: of weights from their values, of activations from batches.

One pass over the data: while a model is observed its weights are quantized and its activations pass through, counted in
a histogram per site (memory independent of the number of images). `Histogram` is exact over batches and ranks, so
that two ranks find the ranges one rank finds on the same images.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.cost import batch_size, count_macs
from lq.errors import DataError, NoEffectWarning
from lq.histogram import Reduce
from lq.interception import call_quantizers
from lq.quantizer import WeightQuantizer
from lq.sites import (
    activation_quantizers,
    calls,
    float_weight,
    input_quantizer,
    quantized_layers,
    quantizers,
    require_attached,
    weight_quantizer,
)
from lq.stored import find_range

M = TypeVar("M", bound=nn.Module)

#: Runs the model on a batch; what it returns is ignored.
Forward = Callable[[Any, Any], Any]


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
        forward: called with the model and a batch; by default ``model(batch)``, or ``model(batch[0])`` for tuples and
            lists.
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
    if not sites and all(quantizer.calibrated for quantizer in quantizers(model)):
        return model
    with eval_mode(model), torch.no_grad():
        try:
            observed = {name: site.observe() for name, site in sites.items()}
            seen = 0
            for batch in batches:
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
    unseen = []
    for name, site in sites.items():
        histogram = observed[name]
        if reduce is not None:
            histogram.reduce(reduce, site.bits.device)
        if histogram.counts is None:
            unseen.append(name)
        else:
            site.calibrate(histogram)
    if unseen:
        warnings.warn(
            f"{len(unseen)} activations were never seen ({', '.join(unseen[:3])}, ...): the model uses weights without "
            "calling their layers (pass structure=lq.inspect(model, example) to lq.attach), or took another path",
            NoEffectWarning,
            stacklevel=2,
        )
    return model


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
    """Whether a quantizer of `model` has no range yet."""
    return any(not quantizer.calibrated for quantizer in quantizers(model))


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run `model` on a batch.

    Raises:
        DataError: if the batch is of an unknown kind, or the model fails on it.
    """
    try:
        if forward is not None:
            return forward(model, batch)
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if not isinstance(batch, Tensor):
            raise TypeError("the default forward takes a tensor, or a tuple or list that starts with one")
        parameter = next(model.parameters(), None)
        return model(batch if parameter is None else batch.to(parameter.device))
    except DataError:
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError) as error:
        raise DataError(
            f"{type(model).__name__} did not take a batch of {describe(batch)}: {error}; "
            "pass forward=, a callable that is given the model and the batch and runs the one on the other"
        ) from error


def describe(batch: Any) -> str:
    """The shape of a batch in words.

    >>> describe([torch.zeros(2, 3), {"y": 1}])
    'list(Tensor(2, 3), dict(y: int))'
    """
    if isinstance(batch, Tensor):
        return f"Tensor{tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__}({', '.join(f'{key}: {describe(value)}' for key, value in batch.items())})"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}({', '.join(map(describe, batch))})"
    return type(batch).__name__


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
