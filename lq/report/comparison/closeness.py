r"""How close a tensor is to another: SQNR, cosine and KL divergence, from sums that batches add to.

With rows ``x_r`` of float values and ``y_r`` of quantized ones - the vectors of tokens, the samples of anything else:

- SQNR, the signal-to-quantization-noise ratio in decibels: ``-10 log10(mean_r |y_r - x_r|^2 / |x_r|^2)``. One bit is
  about 6 dB; 20 dB is an error of a tenth of the values' root mean square. Kept within -200 and 200 dB; 200: equal.
  Each row counts the same: over all values at once, the few massive ones of a transformer, which ranges leave out on
  purpose, would be all that there is. Rows with less than a hundredth of the median energy count as if they had that.
- cosine: the mean over rows of ``x_r y_r / (|x_r| |y_r|)``. It does not see a common factor, which the SQNR does.
- KL: ``KL(p || q)`` in nats, of the distributions of single values, float ``p`` and quantized ``q``, as histograms of
  256 bins over the range that holds 99.8 % of the first float tensor (the outer bins hold what lies beyond). Half a
  count is added to every bin, so that empty ones stay finite. It sees values that gather (a grid too coarse) or pile up
  at an end (a range too narrow), not which value went where.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BINS = 256
#: Decibels of equal tensors.
EQUAL = 200.0
# Values of a tensor that are counted in histograms, and share of them beyond each end.
_COUNTED, _BEYOND = 1 << 18, 0.001
# Share of the median energy of rows that counts as the least.
_LEAST = 0.01


@dataclass(frozen=True)
class Closeness:
    """How close quantized values are to the float ones.

    Args:
        sqnr: signal-to-quantization-noise ratio, in dB; 200: equal.
        cosine: cosine of the angle between them.
        kl: KL divergence of the histograms of their values, in nats.
    """

    sqnr: float
    cosine: float
    kl: float


class Tally:
    """Sums of what two tensors have in common; its size does not depend on how many were added."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of relative errors, of cosines, of rows, values, values left out
        self._range: tuple[float, float] | None = None
        self._counts: Tensor | None = None  # (2, bins), of float and of quantized values

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows of float values `x` and quantized values `y`, (rows, values). NaN and Inf are left out."""
        x, y = (t.detach().to(exact(t)) for t in (x, y))
        good = x.isfinite() & y.isfinite()
        left_out = x.numel() - int(good.sum())
        if left_out:
            x, y = x.where(good, 0.0), y.where(good, 0.0)
        errors, norms = relative_errors(x, y)
        both = norms * y.square().sum(1, dtype=sum_type(y))
        product = (x * y).sum(1, dtype=sum_type(x))
        cosines = torch.where(
            both > 0, product / both.clamp(min=torch.finfo(both.dtype).tiny).sqrt(), (errors == 0).to(product.dtype)
        )
        counted = (norms > 0) | (errors > 0)  # rows of zeros say nothing
        rows = counted.sum().to(errors.dtype)
        found = [errors[counted].sum(), cosines[counted].sum(), rows, rows.new_tensor(x.numel() - left_out)]
        sums = torch.stack([*found, rows.new_tensor(left_out)]).cpu().double()
        self._sums = sums if self._sums is None else self._sums + sums
        x, y = (x[good], y[good]) if left_out else (x.flatten(), y.flatten())
        step = max(x.numel() // _COUNTED, 1) | 1  # odd, so that it goes through all channels
        if x.numel():
            self._count(x[::step], y[::step])

    def _count(self, x: Tensor, y: Tensor) -> None:
        if self._range is None:
            outside = max(int(_BEYOND * x.numel()), 1)
            low, high = (float(x.kthvalue(k)[0]) for k in (outside, max(x.numel() - outside + 1, 1)))
            self._range = (low, high) if high > low else (low - 0.5, low + 0.5)
        low, high = self._range
        scale = _BINS / (high - low)
        if not math.isfinite(scale):  # a range of denormal numbers
            return
        bins = [((t - low) * scale).clamp_(0, _BINS - 1).long() for t in (x, y)]
        counts = torch.stack([torch.bincount(b, minlength=_BINS) for b in bins]).cpu().double()
        self._counts = counts if self._counts is None else self._counts + counts

    def packed(self) -> Tensor:
        """What is added over ranks, (7,): the sums; the KL divergence of this rank, times its values, and these."""
        sums = torch.zeros(5, dtype=torch.double) if self._sums is None else self._sums
        counted = 0.0 if self._counts is None else float(self._counts[0].sum())
        return torch.cat([sums, torch.tensor([self._divergence() * counted, counted], dtype=torch.double)])

    def _divergence(self) -> float:
        if self._counts is None:
            return 0.0
        p, q = (self._counts + 0.5) / (self._counts + 0.5).sum(1, keepdim=True)
        return float((p * (p / q).log()).sum())


def unpacked(packed: Tensor) -> tuple[Closeness | None, int, int]:
    """The closeness that `Tally.packed` stands for, how many values it is of, and how many were left out.

    The KL divergence of several ranks is the mean of theirs.
    """
    errors, cosines, rows, values, left_out, divergence, counted = packed.tolist()
    if not values:
        return None, 0, int(left_out)
    found = Closeness(
        sqnr=decibels(errors / max(rows, 1.0)),
        cosine=max(-1.0, min(cosines / rows, 1.0)) if rows else 1.0,
        kl=max(divergence / max(counted, 1.0), 0.0),
    )
    return found, int(values), int(left_out)


def relative_errors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``|y_r - x_r|^2 / |x_r|^2`` and ``|x_r|^2`` of each row, (rows,) each."""
    norms = x.square().sum(1, dtype=sum_type(x))
    if not norms.numel():
        return norms, norms
    least = _LEAST * norms.median()
    least = least if bool(least > 0) else _LEAST * norms.mean()
    tiny = torch.finfo(norms.dtype).tiny
    return (y - x).square().sum(1, dtype=sum_type(x)) / norms.clamp(min=float(least)).clamp(min=tiny), norms


def decibels(error: float) -> float:
    """``-10 log10(error)`` of a relative squared error, within -200 and 200.

    >>> decibels(0.01), decibels(0.0)
    (20.0, 200.0)
    """
    return EQUAL if error <= 0 else max(-EQUAL, min(-10 * math.log10(error), EQUAL))


def exact(tensor: Tensor) -> torch.dtype:
    """What values are compared in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def sum_type(tensor: Tensor) -> torch.dtype:
    """What sums of them are taken in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
