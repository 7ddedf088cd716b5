"""What the fitting of a unit is made of: a method, its data, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lq.reconstruction.capture import Inputs, Outputs
from lq.reconstruction.drop import Drop
from lq.reconstruction.losses import Loss, RelativeLoss
from lq.reconstruction.rounding import Rounding

#: Where the rounding starts: at the float weights, or nearer to what error feedback chooses.
Start = Literal["float", "feedback"]

#: What becomes of the activations of a unit while it is fitted.
Activations = Literal["learned", "quantized", "float"]


@dataclass(frozen=True)
class Method:
    """How a unit is fitted.

    Args:
        rounding: how the levels of weights are chosen.
        loss: between the unit's output and the float one.
        drop: share of activations that stay float, by progress.
        iterations: steps of the optimizer.
        batch_size: samples in a step, over all ranks.
        activation_mode: "learned" (their steps are learned along), "quantized" (with the steps they have) or "float".
        step_lr: learning rate of the logarithm of activation steps, for Adam; falls to 0 as a cosine; None: by the
            number of iterations.
        early_stop: end when the loss falls no further and the rounding is decided.
        compile: run the unit through ``torch.compile``.
        regularization: weight of the squared differences of activations inside of the unit (NWQ).
        bias_lr: learning rate of the biases, for Adam; falls to 0 as a cosine; 0: they stay.
        start: where the rounding starts: at the "float" weights, or nearer to what error "feedback" chooses.
    """

    rounding: Rounding
    loss: Loss
    drop: Drop
    iterations: int = 20_000
    batch_size: int = 32
    activation_mode: Activations = "learned"
    step_lr: float | None = None
    early_stop: bool = False
    compile: bool = False
    regularization: float = 0.0
    bias_lr: float = 0.0
    start: Start = "float"

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the rounding and of the logarithms of steps.

        What is learned has to go a certain way in however many steps there are. Published is 1e-3 for the rounding (and
        4e-5 for steps themselves, QDrop), for 20 000 iterations. Deviates: for fewer, both are larger, up to ten times
        for 2 000; on ResNet-20 at W2A2, 400 iterations with 1e-2 do what 2 000 with 1e-3 do.
        """
        share = min(max(20_000 / self.iterations, 1.0), 10.0)
        lr, step_lr = self.rounding.lr, self.step_lr
        return 1e-3 * share if lr is None else lr, 1e-4 * share if step_lr is None else step_lr


@dataclass
class Fitted:
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


@dataclass
class Data:
    """All samples of a unit.

    Args:
        inputs: from the network quantized so far.
        float_inputs: from the float network.
        targets: what the float unit makes of them.
        weights: squared gradients at the output, for losses that weigh by them.
    """

    inputs: Inputs
    float_inputs: Inputs
    targets: Outputs
    weights: Outputs | None = None


@dataclass
class Inside:
    """Activations inside of a unit, to be held near those of the float network.

    Args:
        float_modules: the unit in the float network.
        pairs: modules inside of the unit, in the quantized and in the float network, whose outputs are compared.
    """

    float_modules: Sequence[nn.Module]
    pairs: Sequence[tuple[nn.Module, nn.Module]]

    def difference(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of squared differences (`RelativeLoss`), each summed over channels and averaged over the rest."""
        return torch.stack([_SQUARED(output, target, None) for output, target in pairs]).sum()


_SQUARED = RelativeLoss()
