"""What a gradient estimator says: which parts of the grid are learned, and what it changes of the gradients."""

from typing import ClassVar, Literal

from torch import Tensor

from lq.quantizer.rounding import Bound

#: The parts of a quantizer's grid, by the names of its parameters.
Part = Literal["log2_step", "zero_point", "bits"]


class Estimator:
    """Gradients through a quantizer: plain straight-through ones where a subclass does not say otherwise.

    Estimators hold no state of a tensor: one object serves all quantizers of a model.
    """

    #: Whether `weigh` does anything, and whether `weigh` or `noise` do.
    weighs: ClassVar[bool] = False
    changes_gradients: ClassVar[bool] = False

    @property
    def error_weight(self) -> float | None:
        """``w``, if `weigh` adds ``w * |grad| * error``, which fused kernels do too; None: something else."""
        return None

    @property
    def learns(self) -> frozenset[Part]:
        """What is learned; the zero point only where the grid has one that follows the data."""
        return frozenset()

    @property
    def of_activations(self) -> "Estimator":
        """What quantizers of activations take in its place."""
        return self

    def gradient_scale(self, count: float, high: Bound) -> Bound:
        """Factor on the gradients to the grid, for `count` values per step and the highest level `high`."""
        return 1.0

    def weigh(self, grad: Tensor, error: Tensor) -> None:
        """Change the gradient to values in place; large tensors come in blocks of values.

        Args:
            grad: straight-through gradient, 0 outside the grid; shape (rows that share a step, values).
            error: ``v - round(v)`` in steps; same shape.
        """

    def noise(self, size: Tensor) -> Tensor | None:
        """A random part of ``dL/ds``, given ``s * |g|`` over the values that share a step; None: there is none."""
        return None
