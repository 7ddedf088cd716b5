"""Where the values that share a step lie in memory, as the kernels of a GPU want to know it."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Values in memory as (outer, channels, inner); those of a channel share a step."""

    outer: int
    channels: int
    inner: int

    @property
    def count(self) -> int:
        """Values for each step."""
        return self.outer * self.inner

    @classmethod
    def of(cls, x: Tensor, step: Tensor) -> "Places | None":
        """Of the values of `x`, to which the steps broadcast; None: they have gaps, or channels do not lie together.

        >>> import torch
        >>> Places.of(torch.zeros(4, 6, 3, 3), torch.ones(1, 6, 1, 1))
        Places(outer=4, channels=6, inner=9)
        >>> Places.of(torch.zeros(4, 6, 3, 3).to(memory_format=torch.channels_last), torch.ones(1, 6, 1, 1))
        Places(outer=36, channels=6, inner=1)
        """
        order = sorted((d for d in range(x.ndim) if x.shape[d] != 1), key=x.stride, reverse=True)  # outermost first
        sizes = [x.shape[d] for d in order]
        if [x.stride(d) for d in order] != [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]:
            return None
        first = x.ndim - step.ndim
        own = [i for i, d in enumerate(order) if d >= first and step.shape[d - first] != 1]
        if not own:
            return cls(1, 1, x.numel())
        dims = [order[i] for i in own]
        if own != list(range(own[0], own[-1] + 1)) or dims != sorted(dims):
            return None
        return cls(*(math.prod(part) for part in (sizes[: own[0]], sizes[own[0] : own[-1] + 1], sizes[own[-1] + 1 :])))
