r"""Error feedback (OBQ / GPTQ): weights are rounded one input after the other, and those still to come make up for it.

With ``H`` the sum of ``x x^T`` over the inputs of a layer, rounding column j by ``e_j = (w_j - Q(w_j)) / U_jj``
changes the columns behind it by ``-e_j U_j``, where U is the upper Cholesky factor of ``H^-1``: what is left of the
squared error of the layer's output is least, given the rounding so far. Columns with large ``H_jj`` come first.

Source: Frantar et al., GPTQ, ICLR 2023, section 3 and algorithm 1; Frantar and Alistarh, Optimal Brain Compression,
NeurIPS 2022. All rows of a layer go through together. Where reconstruction follows, the choice up or down is where the
rounding starts from, halfway from the float weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.errors import StateError

# Share of the mean of the diagonal of H that is added to it.
_DAMPING = 0.01


class Correlation:
    """Sums ``x x^T`` over the inputs of a layer, a Linear or a Conv2d.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self.total: Tensor | None = None  # (groups, N, N)

    def add(self, x: Tensor) -> None:
        """Count an input of the layer."""
        rows = self._vectors(x.detach().float())
        product = rows.transpose(1, 2) @ rows
        self.total = product if self.total is None else self.total + product

    def _vectors(self, x: Tensor) -> Tensor:
        """What the weights of one output are multiplied by, (groups, vectors, N)."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x.reshape(1, -1, x.shape[-1])
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        columns = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)  # (S, C * kernel, positions)
        vectors: Tensor = columns.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        return vectors

    def levels(self, values: Tensor, low: Tensor, high: Tensor, offset: Tensor) -> Tensor:
        """Levels of the layer's weights; all (C, N), `values` in steps."""
        if self.total is None:
            raise StateError("no input of the layer was seen")
        parts = (t.chunk(self.groups) for t in (values, low, high, offset))
        return torch.cat([error_feedback(v, h, *b) for h, v, *b in zip(self.total, *parts, strict=True)])


def error_feedback(values: Tensor, correlation: Tensor, low: Tensor, high: Tensor, offset: Tensor) -> Tensor:
    """Levels of a layer's weights.

    Args:
        values: weights in steps, (C, N): a row for each output channel.
        correlation: H, (N, N).
        low: lowest levels, (C, N), the same along a row.
        high: highest levels, likewise.
        offset: 0 where levels are multiples of the step, 0.5 where they lie halfway between; likewise.

    Returns:
        Levels, (C, N).

    Steps differ by row only, so that errors in steps may be fed back as they are.
    """
    h = correlation.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order] + torch.eye(len(h), dtype=h.dtype, device=h.device) * (_DAMPING * mean)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    rest = values[:, order].clone()
    levels = torch.empty_like(rest)
    for j in range(rest.shape[1]):
        column = rest[:, j : j + 1]
        shift, least, most = (t[:, :1] for t in (offset, low, high))
        levels[:, j : j + 1] = torch.minimum(torch.maximum((column - shift).round() + shift, least), most)
        error = (column - levels[:, j : j + 1]) / upper[j, j]
        rest[:, j + 1 :] -= error * upper[j, j + 1 :]
    in_order = torch.empty_like(levels)
    in_order[:, order] = levels
    return in_order
