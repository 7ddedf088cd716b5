r"""Ridge regression: weights that make up for the error of a layer's input, in closed form, before they are rounded.

Of a layer with the float input X and the input X~ of the quantized network, one row for each place of each sample, the
change of the weight W, (C, N), that brings the outputs nearest to each other is

    ``dW^T = (X~^T X~ + lambda I)^-1 X~^T (X - X~) W^T``.

Sums over all samples are kept, two matrices (N, N) for each group of a layer, never the rows themselves. Layers of a
unit are solved for one after the other, the others as they are by then, none of them rounded.

A layer that has seen fewer rows than five times N is left as it is: the head of a classifier, of which a sample is one
row, would learn the samples by heart.

Source: Zhong et al., ERQ, ICML 2024, its first step. Deviates: lambda is a hundredth of the mean diagonal of ``X~^T
X~``. The second step, rounding half of the weights and making up for it with the rest, is what error feedback does.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lq.reconstruction.capture import Inputs, call
from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import Problem
from lq.reconstruction.quantizers import tapped
from lq.reconstruction.rounding import WeightGrid
from lq.reconstruction.rounding.feedback import Correlation

# Share of the mean diagonal that lambda is.
_LAMBDA = 0.01
# Rows for each of the N inputs of a layer, below which it is left as it is.
_LEAST = 5


class Regression:
    """Sums over the inputs of a layer, a Linear or a Conv2d.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self._rows = Correlation(layer)
        self.rows = 0  # seen, on all ranks
        self.sums: Tensor | None = None  # of X~^T X~ and X~^T (X - X~); (2, groups, N, N)

    def add(self, quantized: Tensor, whole: Tensor) -> None:
        """Count an input of the layer, in the quantized and in the float network."""
        ours, theirs = (self._rows.vectors(x.detach().float()) for x in (quantized, whole))
        self.rows += ours.shape[1]
        sums = torch.stack([ours.transpose(1, 2) @ other for other in (ours, theirs - ours)]).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def change(self, weight: Tensor) -> Tensor:
        """The change of the weight, in its shape; 0 if no input was seen."""
        if self.sums is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        rows = weight.detach().double().flatten(1).unflatten(0, (self.sums.shape[1], -1))  # (groups, C / groups, N)
        correlation, error = self.sums
        damping = _LAMBDA * correlation.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        damped = correlation + damping.view(-1, 1, 1) * torch.eye(correlation.shape[-1]).to(correlation)
        solved = torch.linalg.solve(damped, error @ rows.transpose(1, 2))
        change: Tensor = solved.transpose(1, 2).reshape(weight.shape)
        return change.float()


@torch.no_grad()
def ridge_changes(problem: Problem, grid: WeightGrid, options: RunOptions) -> Tensor:
    """Changes of the weights of a unit, in steps, (W,); 0 for layers of other kinds, and weights of functions."""
    weights = problem.quantizers.weights
    layers = {id(one.weight): one.module for one in problem.quantizers.layers}
    changed = [weight.detach().float() for _, weight in weights]
    with ExitStack() as stack:
        for i, (quantizer, weight) in enumerate(weights):
            stack.enter_context(tapped(quantizer, partial(_one_of, changed, i, weight.dtype)))
        for i, (_, weight) in enumerate(weights):
            layer = layers.get(id(weight))
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                found = _regression(problem, layer, options)
                if found.sums is not None and found.rows >= _LEAST * found.sums.shape[-1]:
                    changed[i] = changed[i] + found.change(weight)
    flat = [(new - old.detach().float()).reshape(-1) for new, (_, old) in zip(changed, weights, strict=True)]
    return (torch.cat(flat) if flat else torch.zeros_like(grid.values)) / grid.step


def _one_of(weights: Sequence[Tensor], i: int, dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weights[i].to(dtype)


def _regression(problem: Problem, layer: nn.Linear | nn.Conv2d, options: RunOptions) -> Regression:
    """The sums over what a layer reads in the unit as it is now, and in the float one, of all samples."""
    regression, twin = Regression(layer), _twin(problem, layer)
    for rows in problem.chunks(options.batch_size):
        ours = _inputs(problem.modules, layer, problem.inputs, rows)
        floats = _inputs(problem.float_modules, twin, problem.float_inputs, rows)
        for x, y in zip(ours, floats, strict=True):
            regression.add(x, y)
    if regression.sums is not None and options.reduce is not None:
        regression.rows = int(options.reduce(regression.sums.new_tensor(float(regression.rows)), "sum"))
        regression.sums = options.reduce(regression.sums, "sum")
    return regression


def _twin(problem: Problem, module: nn.Module) -> nn.Module:
    """The layer of the float unit that a layer of the quantized one was."""
    for ours, theirs in zip(problem.modules, problem.float_modules, strict=True):
        for name, part in ours.named_modules():
            if part is module:
                return theirs.get_submodule(name)
    return module


def _inputs(unit: Sequence[nn.Module], layer: nn.Module, inputs: Inputs, rows: slice) -> list[Tensor]:
    """What a layer reads as the unit runs on some samples."""
    taken: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken.append((args[0] if args else kwargs["input"]).clone())  # what comes may change it in place

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        call(unit, inputs.batch(rows), inputs.spec)
    finally:
        handle.remove()
    return taken
