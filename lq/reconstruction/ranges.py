"""The ranges of a unit's activations, fitted to those of the float network before its rounding is learned."""

from contextlib import ExitStack

import torch

from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import Problem, mean_loss
from lq.reconstruction.quantizers import tapped


@torch.no_grad()
def refit_ranges(problem: Problem, options: RunOptions) -> None:
    """Fit the ranges of a unit's activations to those of the float network, which it is to be near to.

    Quantizers that an earlier unit has settled keep their range.
    """
    quantizers = problem.quantizers
    with ExitStack() as stack:
        for quantizer in [quantizer for quantizer, _ in quantizers.weights] + quantizers.activations:
            stack.enter_context(tapped(quantizer, lambda x: x))
        histograms = [quantizer.observe() for quantizer in quantizers.learned]
        for _ in problem.run_on(problem.float_inputs, options.batch_size):
            pass
    for activation, histogram in zip(quantizers.learned, histograms, strict=True):
        if options.reduce is not None:
            histogram.reduce(options.reduce, activation.bits.device)
        if histogram.counts is not None:
            activation.calibrate(histogram)


@torch.no_grad()
def refit_ranges_if_better(problem: Problem, options: RunOptions) -> float | None:
    """`refit_ranges`, unless the loss of the unit is less with the steps it has, such as learned ones.

    Returns:
        The loss now; None if it is not known.
    """
    learned = problem.quantizers.learned
    before = [(quantizer, quantizer.log2_step.clone(), quantizer.zero_point.clone()) for quantizer in learned]
    loss_before = mean_loss(problem, options)
    refit_ranges(problem, options)
    if options.activation_mode == "float":
        return None  # activations pass meanwhile: the loss does not tell
    loss = mean_loss(problem, options)
    if loss <= loss_before:
        return loss
    for quantizer, log2_step, zero_point in before:
        quantizer.log2_step.copy_(log2_step)
        quantizer.zero_point.copy_(zero_point)
        quantizer.refresh()
    return loss_before
