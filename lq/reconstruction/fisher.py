"""Squared gradients of the log-likelihood at the output of every unit: one forward and one backward of the float model.

Labels are drawn from the model's own distribution, one for each sample, so that none are needed (and the expectation of
the squared gradient is the diagonal of the Fisher information). BRECQ's objective weighs errors by them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lq.quantizer.histogram import Reduce
from lq.reconstruction.capture import Batches, Outputs
from lq.reconstruction.flow import Flow, Run
from lq.reconstruction.storage import Storage, Stored
from lq.reconstruction.units import Unit
from lq.structure.outputs import require_output


def squared_gradients(
    model: nn.Module,
    units: Sequence[Unit],
    flow: Flow,
    run: Run,
    batches: Batches,
    storage: Storage,
    dtype: torch.dtype | None,
    seed: int,
    reduce: Reduce | None,
    ranks: int,
) -> list[Outputs]:
    """For each unit, the squared gradient at its output for every sample, scaled to a mean of 1 over the first batch.

    Args:
        model: the float model, in eval mode.
        units: its units.
        flow: how samples lie in their outputs.
        run: runs the model on a batch; returns logits, (N, C, ...).
        batches: all data.
        storage: where the gradients are kept.
        dtype: what they are kept as; None: as they are.
        seed: of the labels.
        reduce: combines a tensor over ranks.
        ranks: number of ranks.

    Raises:
        DataError: if the model's output is no tensor of logits.
    """
    kept: list[Stored | None] = [None] * len(units)
    types: list[torch.dtype] = [torch.float32] * len(units)
    scales: dict[int, Tensor] = {}
    device = storage.device
    generator = torch.Generator(device).manual_seed(seed)
    outputs: dict[int, Tensor] = {}

    def keep(k: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[k] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[k] * 1  # code behind it may change it in place

        return hook

    for start, _, batch in batches:
        outputs.clear()
        with ExitStack() as stack:
            for k, unit in enumerate(units):
                stack.callback(unit.bind(model)[-1].register_forward_hook(keep(k)).remove)
            stack.enter_context(torch.enable_grad())
            logits = require_output(run(model, batch))
            likelihood = logits.float().log_softmax(1)
            with torch.no_grad():
                flat = likelihood.movedim(1, -1).flatten(0, -2)
                labels = torch.multinomial(flat.exp(), 1, generator=generator)
            total = likelihood.movedim(1, -1).flatten(0, -2).gather(1, labels).sum()
            order = sorted(outputs)
            grads = torch.autograd.grad(total, [outputs[k] for k in order], allow_unused=True)
        for k, grad in zip(order, grads, strict=True):
            squares = torch.zeros_like(outputs[k], dtype=torch.float32) if grad is None else grad.float().square()
            rows = flow.outputs[k].rows(squares)
            room = kept[k]
            if room is None:
                types[k] = rows.dtype
                kept[k] = room = storage.empty((batches.samples, *rows.shape[1:]), dtype or rows.dtype)
            if k not in scales:  # half precision would not hold the squares themselves
                mean = rows.double().mean()
                scales[k] = (mean if reduce is None or ranks == 1 else reduce(mean, "sum") / ranks).clamp(min=1e-300)
            room.write(start, rows / scales[k].to(rows.dtype).clamp(min=1e-30))
    return [
        Outputs(room, lies, device, dtype)
        for room, lies, dtype in zip((r for r in kept if r is not None), flow.outputs, types, strict=True)
    ]
