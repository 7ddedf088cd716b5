"""One unit as an optimization problem: what is learned of it, what goes in, what should come out; and its solution."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq.errors import StateError
from lq.reconstruction.capture import Inputs, Outputs, call
from lq.reconstruction.losses import RelativeLoss
from lq.reconstruction.objective import NetworkLoss, Objective, OfOutput
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
        objective: what it is fitted by, if the loss looks at the network behind the unit.
        float_modules: the modules of the unit in the float network.
    """

    name: str
    modules: Sequence[nn.Module]
    quantizers: UnitQuantizers
    inputs: Inputs
    float_inputs: Inputs
    targets: Outputs
    loss_weights: Outputs | None = None
    inner: InnerOutputs | None = None
    objective: Objective | None = None
    float_modules: Sequence[nn.Module] = ()

    def objective_of(self, options: RunOptions) -> Objective:
        """What it is fitted by."""
        if self.objective is not None:
            return self.objective
        if isinstance(options.loss_function, NetworkLoss):
            raise StateError(f"the problem of unit {self.name} has no objective, and {options.loss!r} begins one")
        return OfOutput(options.loss_function, self.loss_weights)

    def passes(self, options: RunOptions) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which samples, outputs of the unit as it is in the model, and targets."""
        for rows in self.chunks(options.batch_size):
            with torch.no_grad():
                output = call(self.modules, self.inputs.batch(rows), self.inputs.spec)
            yield rows, output, self.targets.batch(rows)

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
    objective = problem.objective_of(options)
    for rows, output, target in problem.passes(options):
        total += objective.measure(output, target, rows) * (rows.stop - rows.start)
    total /= problem.samples
    return float(options.mean_over_ranks(total))
