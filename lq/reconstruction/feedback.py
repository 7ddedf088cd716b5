"""Levels by error feedback for the weights of a unit: where its rounding starts with ``start="feedback"``.

The method is in `lq.reconstruction.rounding.feedback`; here are the inputs of a unit's layers, on which it works.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import Problem
from lq.reconstruction.rounding import WeightGrid
from lq.reconstruction.rounding.feedback import Correlation

# An input of a layer, and what it is to be counted by.
_LayerInput = tuple[Correlation, Tensor]


@torch.no_grad()
def feedback_levels(problem: Problem, grid: WeightGrid, options: RunOptions) -> Tensor:
    """The levels that error feedback chooses, (W,); the nearest ones of layers it does not know."""
    correlations = _correlations(problem, options)
    levels = []
    flat = (grid.values, *(torch.as_tensor(b, device=grid.values.device).expand_as(grid.values) for b in grid.bounds))
    rows = zip(*(grid.split(part) for part in (*flat, grid.nearest())), strict=True)
    for (_, weight), (values, low, high, offset, nearest) in zip(problem.quantizers.weights, rows, strict=True):
        correlation = correlations.get(id(weight))
        if correlation is None or correlation.total is None:
            levels.append(nearest.reshape(-1))
            continue
        if options.reduce is not None:
            correlation.total = options.reduce(correlation.total, "sum")
        levels.append(correlation.levels(*(part.flatten(1) for part in (values, low, high, offset))).reshape(-1))
    return torch.cat(levels) if levels else grid.values


def _correlations(problem: Problem, options: RunOptions) -> dict[int, Correlation]:
    """The correlations of the inputs of linear layers and convolutions, by the identity of their weight."""
    decided = {id(weight) for _, weight in problem.quantizers.weights}
    layers = [(id(layer.weight), layer.module) for layer in problem.quantizers.layers if id(layer.weight) in decided]
    modules = [(key, module) for key, module in layers if isinstance(module, (nn.Linear, nn.Conv2d))]
    correlations = {key: Correlation(module) for key, module in modules}
    taken: list[_LayerInput] = []  # counted after the run, whose own products are quantized by their order
    with ExitStack() as stack:
        for key, module in modules:
            hook = partial(_take_input, taken, correlations[key])
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for _ in problem.run_on(problem.inputs, options.batch_size):
            for correlation, x in taken:
                correlation.add(x)
            taken.clear()
    return correlations


def _take_input(
    taken: list[_LayerInput], correlation: Correlation, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    taken.append((correlation, (args[0] if args else kwargs["input"]).clone()))  # what comes may change it in place
