"""Squared gradients of the log-likelihood at the output of every unit: one forward and one backward of the float model.

Labels are drawn from the model's own distribution, one for each sample, so that none are needed (and the expectation of
the squared gradient is the diagonal of the Fisher information). BRECQ's objective weighs errors by them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lq.bars import steps
from lq.reconstruction.capture import Capture, Outputs
from lq.reconstruction.options import RunOptions
from lq.reconstruction.storage import Stored
from lq.structure.outputs import require_output


def squared_gradients(capture: Capture, options: RunOptions) -> list[Outputs]:
    """For each unit, the squared gradient at its output for every sample, scaled to a mean of 1 over the first batch.

    Args:
        capture: the float model, in eval mode, whose run returns logits, (N, C, ...); its units and batches. Gradients
            are kept as it keeps tensors.
        options: the seed of the labels, and how to combine tensors over ranks.

    Raises:
        DataError: if the model's output is no tensor of logits.
    """
    units, batches, flow = capture.units, capture.batches, capture.flow
    stored: list[Stored | None] = [None] * len(units)
    types: list[torch.dtype] = [torch.float32] * len(units)
    scales: dict[int, Tensor] = {}
    device = batches.storage.device
    generator = torch.Generator(device).manual_seed(options.seed)
    outputs: dict[int, Tensor] = {}

    def keep(k: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[k] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[k] * 1  # code behind it may change it in place

        return hook

    for start, _, batch in steps(batches, "Measuring gradients", total=len(batches.sizes)):
        outputs.clear()
        with ExitStack() as stack:
            for k, unit in enumerate(units):
                stack.callback(unit.bind(capture.model)[-1].register_forward_hook(keep(k)).remove)
            stack.enter_context(torch.enable_grad())
            total = _log_likelihood(require_output(capture.run(capture.model, batch)), generator)
            order = sorted(outputs)
            grads = torch.autograd.grad(total, [outputs[k] for k in order], allow_unused=True)
        for k, grad in zip(order, grads, strict=True):
            squares = torch.zeros_like(outputs[k], dtype=torch.float32) if grad is None else grad.float().square()
            rows = flow.outputs[k].rows(squares)
            room = stored[k]
            if room is None:
                types[k] = rows.dtype
                shape = (batches.samples, *rows.shape[1:])
                stored[k] = room = batches.storage.empty(shape, capture.dtype or rows.dtype)
            if k not in scales:  # half precision would not hold the squares themselves
                scales[k] = options.mean_over_ranks(rows.double().mean()).clamp(min=1e-300)
            room.write(start, rows / scales[k].to(rows.dtype).clamp(min=1e-30))
    return [
        Outputs(room, layout, device, dtype)
        for room, layout, dtype in zip((r for r in stored if r is not None), flow.outputs, types, strict=True)
    ]


def _log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of labels that are drawn from the model's own distribution, the sum over all samples."""
    likelihood = logits.float().log_softmax(1)
    with torch.no_grad():
        flat = likelihood.movedim(1, -1).flatten(0, -2)
        labels = torch.multinomial(flat.exp(), 1, generator=generator)
    return likelihood.movedim(1, -1).flatten(0, -2).gather(1, labels).sum()
