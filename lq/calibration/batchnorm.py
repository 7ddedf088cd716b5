"""BatchNorm statistics of a quantized model: freeze them, or measure them anew."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.bars import steps
from lq.errors import DataError
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward, eval_mode, run


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
    ranks: int = 1,
) -> None:
    """Set the running statistics of every BatchNorm to their mean over `batches`, in place.

    Args:
        model: any model; all but its BatchNorms runs in eval mode.
        batches: batches to average over, all of about the same size.
        forward: how to run the model on a batch, as in `lq.calibrate`.
        reduce: combines a tensor over ranks.
        ranks: number of ranks that `reduce` combines.

    Raises:
        DataError: if there are no batches.
    """
    norms = batchnorms(model)
    momenta = [norm.momentum for norm in norms]
    before = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
    seen, done = 0, False
    with eval_mode(model), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean
                norm.train()
            for batch in steps(batches, "Measuring BatchNorm"):
                run(model, batch, forward)
                seen += 1
            done = seen > 0
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not done:
                    norm.load_state_dict(buffers, strict=False)
    if not seen:
        raise DataError("re-estimating BatchNorm got no batches: the loader is empty")
    if reduce is not None:
        for norm in norms:
            mean, var = norm.running_mean, norm.running_var
            if mean is not None and var is not None:
                square = reduce(var + mean**2, "sum") / ranks
                mean.copy_(reduce(mean.clone(), "sum") / ranks)
                var.copy_(square - mean**2)
