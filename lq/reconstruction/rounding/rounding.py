"""What the roundings of weights have in common: a start from the float weights, a soft way, a hard end."""

from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from lq.reconstruction.rounding.grid import WeightGrid


class Rates(NamedTuple):
    """Published learning rates for Adam, and for how many iterations of a unit."""

    rounding: float
    steps: float
    iterations: int


#: Those of AdaRound and QDrop; the rate of logarithms of steps is this project's, for QDrop's 4e-5 of steps.
PUBLISHED = Rates(1e-3, 1e-4, 20_000)


class LearnedRounding(Protocol):
    """The rounding of the weights of one unit, while it is learned."""

    #: What an optimizer moves; empty if there is nothing to learn.
    parameters: list[Tensor]

    def advance(self, done: float) -> None:
        """Set temperatures and the like for a share `done` of the iterations, 0 to 1."""
        ...

    def levels(self) -> Tensor:
        """Levels as they are now, perhaps between those of the grid; shape (W,), differentiable."""
        ...

    def penalty(self) -> Tensor | None:
        """What to add to the loss, of the levels that were asked for last; None: nothing."""
        ...

    def hard_levels(self) -> Tensor:
        """The levels that are chosen; shape (W,)."""
        ...


@runtime_checkable
class Rounding(Protocol):
    """A way to choose the level of every weight; a base class, whose subclasses are frozen dataclasses.

    It sees weights alone: what needs the inputs of layers is a ``start``, as `lq.reconstruction.feedback` is.
    """

    #: What is published of it.
    rates: ClassVar[Rates] = PUBLISHED
    #: Whether its learning rate falls to 0, as a cosine.
    falls: ClassVar[bool] = False

    @property
    def lr(self) -> float | None:
        """Learning rate of its parameters, for Adam; None: by the number of iterations."""
        ...

    def begin(self, grid: WeightGrid) -> LearnedRounding:
        """Start from the weights of `grid`."""
        ...
