"""One unit as an optimization problem: what is learned of it, what goes in, what should come out; and its solution."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq.reconstruction.capture import Inputs, Outputs, call
from lq.reconstruction.losses import RelativeLoss
from lq.reconstruction.options import RunOptions
from lq.reconstruction.quantizers import UnitQuantizers


@dataclass
class InnerOutputs:
    """Outputs inside of a unit, to be held near those of the float network.

    Args:
        float_modules: the unit in the float network.
        pairs: modules inside of the unit, in the quantized and in the float network, whose outputs are compared.
    """

    float_modules: Sequence[nn.Module]
    pairs: Sequence[tuple[nn.Module, nn.Module]]

    def difference(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of squared differences (`RelativeLoss`), each summed over channels and averaged over the rest."""
        return torch.stack([_SQUARED(output, target, None) for output, target in outputs]).sum()


_SQUARED = RelativeLoss()


@dataclass
class Problem:
    """A unit, and its inputs and targets for all samples.

    Args:
        name: of the unit.
        modules: the modules of the unit, in eval mode; their parameters need no gradients.
        quantizers: its quantizers.
        inputs: from the network quantized so far.
        float_inputs: from the float network.
        targets: what the float unit makes of them.
        loss_weights: squared gradients at the output, for losses that weigh by them.
        inner: what else is compared, given a regularization.
    """

    name: str
    modules: Sequence[nn.Module]
    quantizers: UnitQuantizers
    inputs: Inputs
    float_inputs: Inputs
    targets: Outputs
    loss_weights: Outputs | None = None
    inner: InnerOutputs | None = None

    @property
    def samples(self) -> int:
        """Number of samples on this rank."""
        return len(self.targets.stored.data)

    def chunks(self, size: int) -> Iterator[slice]:
        """All samples, `size` at a time."""
        for start in range(0, self.samples, size):
            yield slice(start, min(start + size, self.samples))

    def run_on(self, inputs: Inputs, size: int) -> Iterator[Tensor]:
        """Outputs of the unit as it is in the model, `size` samples at a time."""
        for rows in self.chunks(size):
            yield call(self.modules, inputs.batch(rows), inputs.spec)


@dataclass
class Solution:
    """What came of a unit.

    Args:
        before: loss over all samples with nearest rounding and the steps that the fit starts with.
        after: loss over all samples now.
        curve: loss of single batches on the way, evenly spaced.
        iterations: steps that were taken.
    """

    before: float
    after: float
    curve: list[float]
    iterations: int


@torch.no_grad()
def mean_loss(problem: Problem, options: RunOptions) -> float:
    """The loss over all samples on all ranks, of the unit as it is in the model."""
    total = torch.zeros((), device=problem.inputs.device)
    chunks = problem.chunks(options.batch_size)
    for rows, output in zip(chunks, problem.run_on(problem.inputs, options.batch_size), strict=True):
        weights = None if problem.loss_weights is None else problem.loss_weights.batch(rows)
        total += options.loss_function(output, problem.targets.batch(rows), weights) * (rows.stop - rows.start)
    total /= problem.samples
    return float(options.mean_over_ranks(total))
