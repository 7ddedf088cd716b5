"""Where the levels of grids lie whose widths are real numbers, or averages of integers."""

import torch
from torch import Tensor

# Relative error of an average of equal numbers.
_ROUNDING = 1e-5


def without_rounding_error(values: Tensor, unit: float) -> Tensor:
    """`values`, of which those next to a multiple of `unit` are that multiple.

    >>> without_rounding_error(torch.tensor([2.9999998, 2.9]), 1.0)
    tensor([3.0000, 2.9000])
    """
    multiples = (values / unit).round() * unit
    return torch.where((values - multiples).abs() < _ROUNDING * values.abs(), multiples, values)


def middle(bits: Tensor) -> Tensor:
    """Zero point of the signed symmetric grid; between integer widths it goes on without a jump.

    >>> middle(torch.tensor([0.0, 1.0, 1.5, 2.0, 4.0]))
    tensor([0.0000, 0.5000, 1.2500, 2.0000, 8.0000])
    """
    few = torch.where(bits < 1, (torch.exp2(bits) - 1) / 2, 1.5 * bits - 1)
    return torch.where(bits < 2, few, torch.exp2(bits - 1))
