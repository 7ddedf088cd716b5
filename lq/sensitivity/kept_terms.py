r"""The terms of samples, kept for what pairs of tensors lose together: ``Ω = G^T G / 2N`` of ``G[n, i] = g_n · Δ_i``.

Each sample is a row of ``G``. Once there are more samples than rows, a sample is added to the row ``n mod rows`` with a
random sign, which keeps ``G^T G`` in the mean (a count sketch: Charikar, Chen and Farach-Colton 2002): memory does not
grow with the samples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Values that are kept at most, and rows.
_VALUES = 1 << 27
_ROWS = 1024
_LEAST_ROWS = 64


class KeptTerms:
    """Terms of every group of channels of every tensor, at most about half a gigabyte of float32.

    Args:
        values: greatest number of values to keep, unless 64 rows have more.
        rows: greatest number of rows.
    """

    def __init__(self, values: int = _VALUES, rows: int = _ROWS) -> None:
        self._values, self._rows = values, rows
        self._generator = torch.Generator().manual_seed(0)
        self._sums: list[Tensor] = []  # (groups, widths, rows) of each tensor
        self.count = 0

    def add(self, terms: Sequence[Tensor], counted: Tensor | None = None) -> None:
        """Add the terms of a batch, (samples, groups, widths) of each tensor; `counted` says which samples count."""
        if counted is not None:
            terms = [found[counted.to(found.device)] for found in terms]
        if not self._sums:
            width = sum(found[0].numel() for found in terms)
            self._rows = min(self._rows, max(_LEAST_ROWS, self._values // max(width, 1)))
            self._sums = [torch.zeros(*found.shape[1:], self._rows) for found in terms]
        samples = len(terms[0])
        at = torch.arange(self.count, self.count + samples) % self._rows
        signs = torch.randint(2, (samples,), generator=self._generator).mul(2).sub(1).float()
        for total, found in zip(self._sums, terms, strict=True):
            total.index_add_(2, at, (found.cpu().float() * signs[:, None, None]).permute(1, 2, 0))
        self.count += samples

    def found(self, scale: float) -> list[NDArray[np.float32]]:
        """Of each tensor, so that products summed over rows are in units of the loss: (groups, widths, rows)."""
        rows = min(self.count, self._rows)
        return [(total[..., :rows] * (scale / max(self.count, 1)) ** 0.5).numpy() for total in self._sums]
