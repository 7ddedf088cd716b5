"""What a unit is fitted by: a loss of its output alone, or one that has looked at the network behind it.

The second kind knows a unit before it is fitted: it begins with it, may look at all samples again on the way, and is
told which samples an output is of.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lq.reconstruction.behind import Behind
    from lq.reconstruction.capture import Outputs

#: Runs a unit, as it is now, on all samples: which ones, its output, and its target; without gradients.
Passes = Callable[[], Iterator[tuple[slice, Tensor, Tensor]]]


class Objective(Protocol):
    """The loss of one unit."""

    def begin(self, passes: Passes) -> None:
        """Look at the unit as it is in the model, before anything is learned."""
        ...

    def advance(self, step: int, iterations: int, passes: Passes) -> None:
        """Look at the unit as it is now, before a step, if it is time to."""
        ...

    def __call__(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        """The loss of the output for some samples, to be differentiated."""
        ...

    def measure(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        """The loss by which the unit before and after is compared: the same function throughout."""
        ...


class NetworkLoss(ABC):
    """A loss that looks at the network behind a unit."""

    #: Whether it needs the squared gradient of the network's loss.
    weighted = False
    #: Whether it compares what the network's last layer reads.
    of_features = False

    @abstractmethod
    def begin(self, behind: "Behind") -> Objective:
        """The loss of one unit, given the float network behind it."""


class Weights(Protocol):
    """Weights of a unit's output: `Outputs`, or what gives some for any samples."""

    def batch(self, index: Tensor | slice) -> Tensor:
        """Those of some samples."""
        ...


@dataclass
class OfOutput:
    """The objective of a plain loss.

    Args:
        loss: from output, target and weights to a scalar.
        weights: what it weighs errors by; None: nothing.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weights: "Outputs | Weights | None" = None

    def begin(self, passes: Passes) -> None:
        """Nothing to look at."""

    def advance(self, step: int, iterations: int, passes: Passes) -> None:
        """Nothing changes."""

    def __call__(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        """The loss."""
        return self.loss(output, target, None if self.weights is None else self.weights.batch(index))

    def measure(self, output: Tensor, target: Tensor, index: Tensor | slice) -> Tensor:
        """The same."""
        return self(output, target, index)


def weighted_error(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """``mean (z - z~)^2 * w``, summed over channels."""
    error = (output.float() - target.float()).square()
    return (error if weights is None else error * weights).mean() * channels_of(output)


def channels_of(output: Tensor) -> int:
    """Number of channels: dimension 1 of images (N, C, H, W), the last dimension elsewhere."""
    return output.shape[1 if output.ndim == 4 else -1]


def over(value: Tensor, first: Tensor) -> Tensor:
    """A term of a loss over its first value; if that is 0, the term as it is."""
    return value / first.where(first > 0, first.new_ones(()))
