"""Stands where a tensor is read again that another place has a quantizer for."""

import copy

import torch
from torch import Tensor, nn

from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.quantizer import PARTS


class SharedQuantizer(nn.Module):
    """Stands where a tensor is read again that another site has a quantizer for.

    Args:
        owner: the quantizer of that site.
        path: where it is, from the module that holds this one, as a relative path.
    """

    def __init__(self, owner: ActivationQuantizer, path: str) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, not a submodule: its state is saved once, where it is
        self.path = path

    @property
    def owner(self) -> ActivationQuantizer:
        """The quantizer that is shared."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x` as the owner does, on the device of `x`: replicas of a model have the owner of the original."""
        owner = self.owner
        if owner.log2_step.device != x.device:
            owner = copy.copy(owner)
            owner.__dict__.update({part: getattr(self.owner, part).to(x.device) for part in PARTS})
            owner._parameters, owner._buffers = {}, {}
        return owner.forward(x)

    def get_extra_state(self) -> Tensor:
        """The path, in a form that every checkpoint format can hold."""
        return torch.tensor(list(self.path.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: the owner has the state."""

    def extra_repr(self) -> str:
        """Where the quantizer is."""
        return self.path
