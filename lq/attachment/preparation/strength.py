r"""By how much channels are rescaled: r and t of a pair, from the ranges of its channels or from weights.

**Ranges** (RepQ-ViT, arXiv:2212.08254): channels are brought to one range, ``r_c = (width_c / mean width)^a``, and t
moves the centre of each to zero (RepQ-ViT, where a = 1, moves them to their mean). Where only a scale can be taken
back, the width is the largest absolute value. What activations gain, the weights that read them lose: their columns
are multiplied by r. So a is the one of 0, 1/4, 1/2, 3/4 and 1 with the least error that is predicted for what the
readers give,

    E = D_a^2 / 12 * sum(W'^2) + sum_o D_o^2 / 12 * sum_c n_c * E[y'_c^2],

with the step D_a of the activations (one for all channels), the steps D_o of the rows of the weights, and n_c weights
for each input channel. Rounding errors are taken to be uniform and independent.

**Weights** (DFQ, arXiv:1906.04721, equation 11): ``r_c = sqrt(max|W1_c| / max|W2_c|)``, which brings row c of what
makes the channel and column c of what reads it to one range; repeated, as layers belong to two pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.attachment.preparation.channel_ranges import ChannelRanges
from lq.attachment.preparation.parts import Pair, Reader

#: Quantiles between which a channel's range lies.
QUANTILES = 0.001, 0.999
#: Powers that are tried.
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Channels that are narrower than this part of the mean are taken to be as wide, so that nothing is divided by zero.
_NARROWEST = 2.0**-8


@dataclass(frozen=True)
class Widths:
    """Widths in bits that the balance of weights and activations is meant for; None: float."""

    weights: int | None
    activations: int | None


def by_ranges(
    pair: Pair, ranges: ChannelRanges, weights: Mapping[str, Tensor], widths: Widths, power: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """R and t of a pair from the ranges of its channels, float32, and the power a.

    Args:
        pair: the pair.
        ranges: what was seen of its channels.
        weights: the weights of its readers, by name.
        widths: widths in bits that a is chosen for.
        power: a; None: the best one.
    """
    low, high = ranges.quantiles(*QUANTILES)
    if not pair.shifts:
        high = torch.maximum(high, -low).clamp(min=0)
        low = torch.zeros_like(high) if pair.positive else -high
    centre, width = (low + high) / 2, high - low
    mean_width = width.mean()
    if not bool(mean_width > 0):
        return torch.ones(pair.channels), torch.zeros(pair.channels), 0.0
    relative = (width / mean_width).clamp(min=_NARROWEST)
    found = []
    for a in POWERS if power is None else (power,):
        scale = relative.pow(a).float()
        shift = (-centre / scale.double()).float() if pair.shifts else torch.zeros(pair.channels)
        found.append((_error(pair, ranges, low, high, weights, widths, scale, shift), a, scale, shift))
    none = torch.ones(pair.channels), torch.zeros(pair.channels)
    if power is None:
        found.append((_error(pair, ranges, low, high, weights, widths, *none), 0.0, *none))
    _, a, scale, shift = min(found, key=lambda item: item[0])
    return scale, shift, a


def _error(
    pair: Pair,
    ranges: ChannelRanges,
    low: Tensor,
    high: Tensor,
    weights: Mapping[str, Tensor],
    widths: Widths,
    scale: Tensor,
    shift: Tensor,
) -> float:
    """The predicted error of what the readers give, with the channels rescaled."""
    r, t = scale.double(), shift.double()
    ends = float((high / r + t).max()), float((low / r + t).min())
    step = 0.0 if widths.activations is None else (max(ends[0], 0.0) - min(ends[1], 0.0)) / (2**widths.activations - 1)
    mean, square = ranges.means()
    square = square / r**2 + 2 * t * mean / r + t**2
    total = 0.0
    for reader in pair.readers:
        rows, columns = _rows(reader, reader.scaled(weights[reader.weight].cpu(), scale))
        total += step**2 / 12 * float(rows.square().sum())
        if widths.weights is not None:
            steps = rows.abs().amax(1) / (2 ** (widths.weights - 1) - 0.5)
            total += float((steps.square()[:, None] / 12 * square[columns]).sum())
    return total


def _rows(reader: Reader, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as one row for each output channel, and the input channel that each of its values reads."""
    weight = weight.double()
    if reader.transposed:
        rows = weight.transpose(0, 1).flatten(1)
        columns = torch.arange(weight.shape[0]).repeat_interleave(weight[0, 0].numel())
        return rows, columns.expand(rows.shape[0], -1)
    inside = torch.arange(weight.shape[1]).repeat_interleave(weight[0, 0].numel())
    group = torch.arange(weight.shape[0]) // (weight.shape[0] // reader.groups)
    return weight.flatten(1), group[:, None] * weight.shape[1] + inside


def by_weights(pair: Pair, weights: Mapping[str, Tensor]) -> Tensor:
    """R of a pair from its weights alone, float32."""
    made = weights[pair.maker.weight].detach().movedim(pair.maker.dim, 0).flatten(1).abs().amax(1).double()
    read = torch.stack([reader.largest(weights[reader.weight]).double() for reader in pair.readers]).amax(0)
    scale = (made / read).sqrt()
    return torch.where((made > 0) & (read > 0), scale, 1.0).float().cpu()
