"""Copies of models."""

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M) -> M:
    """A deep copy, also of a model that holds computed tensors, which torch does not copy.

    Weight and spectral norms that are hooks keep the weight they have computed as an attribute of the layer. The copy
    has its values, and computes it anew in its next forward.
    """
    computed = (
        value
        for module in model.modules()
        for value in [*vars(module).values(), *module._buffers.values()]
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
