"""Where the output channels of a weight lie, so that every layer kind can be seen as rows of one channel each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ChannelLayout:
    """Output channels of a weight: along `dim`, in `groups` blocks of dimension 0.

    Conv and Linear weights have them along dimension 0, embeddings one per row, the right operand of a matrix product
    along its last. A transposed convolution stores ``(C_in, C_out / groups, ...)``: its channels are the pairs of a
    block of dimension 0 and an index of dimension 1.

    Args:
        channels: number of output channels.
        dim: dimension of the weight that holds them.
        groups: blocks of dimension 0 that have channels of their own (transposed convolutions only).
    """

    channels: int
    dim: int = 0
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module, weight: Tensor) -> "ChannelLayout":
        """The layout of the `weight` of `module`.

        >>> import torch
        >>> ChannelLayout.of(layer := nn.ConvTranspose2d(4, 6, 3, groups=2), layer.weight)
        ChannelLayout(channels=6, dim=1, groups=2)
        """
        if isinstance(module, _TRANSPOSED):
            return cls(module.out_channels, dim=1, groups=module.groups)
        return cls(weight.shape[0])

    def split(self, weight: Tensor) -> Tensor:
        """`weight` with its groups as a dimension of their own, so that `spread` values broadcast over it."""
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def join(self, weight: Tensor) -> Tensor:
        """The inverse of `split`."""
        return weight if self.groups == 1 else weight.flatten(0, 1)

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """`values` of shape (C,) shaped to broadcast over ``split(like)``; scalars are returned as they are."""
        if values.ndim == 0:
            return values
        shape = [1] * (like.ndim + (self.groups > 1))
        if self.groups == 1:
            shape[self.dim] = self.channels
        else:
            shape[0], shape[2] = self.groups, self.channels // self.groups
        return values.view(shape)

    def rows(self, weight: Tensor) -> Tensor:
        """`weight` as (C, N): one row per output channel.

        >>> import torch
        >>> ChannelLayout(6, dim=1, groups=2).rows(torch.zeros(4, 3, 5, 5)).shape
        torch.Size([6, 50])
        """
        if self.groups == 1:
            return weight.movedim(self.dim, 0).flatten(1)
        blocks: Tensor = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return blocks.reshape(self.channels, -1)

    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows`: a weight of `shape`.

        >>> import torch
        >>> weight, layout = torch.rand(4, 3, 5, 5), ChannelLayout(6, dim=1, groups=2)
        >>> torch.equal(layout.from_rows(layout.rows(weight), weight.shape), weight)
        True
        """
        if self.groups == 1:
            rest = [*shape[: self.dim], *shape[self.dim + 1 :]]
            return rows.view(self.channels, *rest).movedim(0, self.dim)
        blocks = rows.view(self.groups, shape[1], shape[0] // self.groups, *shape[2:]).transpose(1, 2)
        return blocks.reshape(*shape)
