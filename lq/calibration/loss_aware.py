r"""LAPQ: ranges by the loss of the whole network instead of the error of each tensor.

Source: Nahshan et al., Loss Aware Post-Training Quantization, Machine Learning 110, 2021. At few bits the loss
couples the ranges of all layers, and the least error of each tensor is not the least loss. Three stages:

1. for each exponent p, every weight and activation gets the range of least error ``|Q(v) - v|^p``
   (`lq.quantizer.ranges.Lp`), and the loss is measured;
2. the least of the parabola through ``(p, loss)`` is tried too. It counts if the parabola is convex and its least lies
   among the exponents: the published code has no such guard. The search begins at the best of all that was tried, the
   ranges that the model came with included, so that the loss never grows;
3. Powell's method (`scipy.optimize`), on the binary logarithm of a factor for each range.

What deviates:

- The loss is the KL divergence of the quantized from the float network by default: it needs no labels. The published
  code calibrates on labels of the validation set; here labels, if any, are those of the batches given.
- Weights have a range per output channel here, and per tensor in the paper. One factor scales the steps of all channels
  of a weight: the number of variables stays that of the tensors.
- Zero points are those of stage 1 or 2; a factor scales both ends of a range.
- A line search probes the present point first, so that it cannot end worse in the first round: its interval, 0.6 octave
  down and one up, has the proportion of a golden section. It stops at a tenth of an octave, after five losses or so.
  200 losses on 256 images leave ResNet-20 (CIFAR-10) with a KL of 0.27 at W3A3 and 1.62 at W2A4. With the interval
  turned round, and half the tolerance, it is 0.52 and 1.91: at few bits steps should be free to grow.
- Tensors of 8 bits and more take no part in stage 3: the best factor on one of ResNet-20's lowers the KL at W3A3 by 5 %
  (on the last weight; 1 % and less on others). Neither do steps that are powers of two, nor weights at calls, whose
  range is found anew where they are used.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lq.attachment.sites import activation_quantizers, quantizers, require_attached
from lq.calibration.network_loss import NamedLoss, NetworkLoss, OutputLoss
from lq.calibration.powell import search_factors
from lq.calibration.refitting import samples_of
from lq.errors import DataError, NoEffectWarning, SpecError, StateError
from lq.quantizer.histogram import Reduce
from lq.quantizer.levels import middle
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.ranges import Levels, Lp, Samples
from lq.structure.forward import Forward, eval_mode
from lq.structure.recomputation import without_recomputation

#: Exponents of the error that are tried.
POWERS = tuple(2 + 2 * i / 9 for i in range(10))
# Ranges of tensors with as many bits are not searched.
_MANY_BITS = 8

_State = list[tuple[Quantizer, Tensor, Tensor]]


@dataclass(frozen=True)
class OptimizedRanges:
    """What `optimize_ranges` has found; all losses are of the same kind, on the same batches.

    Args:
        before: loss with the ranges that the model came with.
        powers: exponents p that were tried, that of the parabola last if there is one.
        losses: loss with the L_p-optimal ranges of each.
        power: exponent that the search began with; None: with the ranges that the model came with.
        after: loss with the ranges that the model has now.
        evaluations: how often the loss was measured.
    """

    before: float
    powers: tuple[float, ...]
    losses: tuple[float, ...]
    power: float | None
    after: float
    evaluations: int

    @property
    def start(self) -> float:
        """Loss where the search began."""
        return min(self.before, *self.losses)

    def __str__(self) -> str:
        begin = "the ranges given" if self.power is None else f"p = {self.power:.2f}"
        return (
            f"loss {self.before:.4g} before, {self.start:.4g} with {begin}, {self.after:.4g} after "
            f"{self.evaluations} evaluations"
        )


def optimize_ranges(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: NamedLoss | OutputLoss = "kl",
    powers: Sequence[float] = POWERS,
    candidates: int = 100,
    evaluations: int = 300,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
) -> OptimizedRanges:
    """Choose the ranges of all quantizers of `model` for the least loss on `batches`, in place; widths stay.

    Deterministic. Weights at calls keep their way of finding a range. If it fails, the model is as it was.

    Args:
        model: a model with quantizers, calibrated by `lq.calibrate`; runs in eval mode, its own modes are restored.
        batches: any iterable of batches, read once and kept; a few hundred samples.
        loss: "kl", the divergence from the float network's outputs (logits, classes along the last dimension); "task",
            the cross-entropy with the classes in ``batch[1]``; or a callable that is given what the forward returned
            and the batch and returns the mean loss.
        powers: exponents of the error that are tried.
        candidates: number of shrinks of the min-max range that each fit tries.
        evaluations: how often Powell's method may measure the loss, besides once for each exponent; 0: no search.
        forward: called with the model and a batch, returns the output; by default as in `lq.calibrate`.
        reduce: combines a tensor over ranks: called with it and "sum"; all ranks find the same ranges.

    Returns:
        The losses.

    Raises:
        StateError: if the model has no quantizers, or they were not calibrated.
        DataError: if there are no batches, the model does not take one, or the loss cannot be computed.
        SpecError: for an unknown loss, exponent, or number of candidates or evaluations.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batches = [torch.randn(64, 4)]
    >>> model = lq.calibrate(lq.attach(model, weights=3, activations=3, first_last=None), batches)
    >>> found = optimize_ranges(model, batches)
    >>> found.after <= found.start <= found.before
    True
    """
    require_attached(model, "lq.optimize_ranges")
    check_arguments(loss, evaluations)
    rules = {float(p): Lp(p=float(p), candidates=candidates) for p in powers}
    if not rules:
        raise SpecError("powers is empty; give at least one exponent, such as powers=(2.4,)")
    _check_calibrated(model)
    given = _ranges(model)
    try:
        with eval_mode(model), without_recomputation(model), torch.no_grad():
            measure = NetworkLoss(model, batches, loss, forward, reduce)
            return _optimize(model, measure, rules, evaluations)
    except BaseException:
        _restore(given)
        raise


def check_arguments(loss: object, evaluations: int) -> None:
    """Raise a SpecError for a loss or number of evaluations that `optimize_ranges` does not know."""
    if not callable(loss) and loss not in get_args(NamedLoss):
        raise SpecError(f"loss={loss!r} is unknown; use 'kl', 'task' or a callable of the output and the batch")
    if evaluations < 0:
        raise SpecError(f"evaluations={evaluations}; give 0 (exponents alone) or more")


def best_of_parabola(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where the parabola through points is least; None if it is not convex or is least outside of `x`.

    >>> round(best_of_parabola([2.0, 3.0, 4.0], [1.0, 0.0, 1.0]), 6)
    3.0
    >>> best_of_parabola([2.0, 3.0, 4.0], [0.0, 1.0, 0.0])
    """
    if len(set(x)) < 3 or not np.isfinite(y).all():
        return None
    middle_of_x = float(np.mean(x))
    curvature, slope, _ = np.polyfit(np.subtract(x, middle_of_x), y, 2)
    if curvature <= 1e-9 * max(np.abs(y).max(), 1e-30):
        return None
    least = middle_of_x - float(slope / (2 * curvature))
    return least if min(x) <= least <= max(x) else None


def _optimize(model: nn.Module, measure: NetworkLoss, rules: dict[float, Lp], evaluations: int) -> OptimizedRanges:
    """All three stages."""
    known = list(samples_of(model))
    given, before = _ranges(model), measure()
    losses: dict[float, float] = {}
    moved = False  # whether any rule gave another range than the model came with

    def take(rule: Lp) -> None:
        for quantizer, samples, signed in known:
            _fit(quantizer, samples, signed, rule)

    def try_out(rule: Lp) -> None:
        nonlocal moved
        take(rule)
        losses[rule.p] = measure()
        moved = moved or _have_moved(given)

    for rule in rules.values():
        try_out(rule)
    best = best_of_parabola(list(losses), list(losses.values()))
    if best is not None and best not in losses:
        rules = {**rules, best: Lp(p=best, candidates=rule.candidates)}
        try_out(rules[best])
    power = min(losses, key=lambda p: losses[p])
    start = min(before, losses[power])
    if not math.isfinite(start):
        raise DataError("the loss is not a finite number with any of the ranges tried; look at the data and the loss")
    if moved and all(loss == before for loss in losses.values()):
        warnings.warn(
            f"the loss is {before:.6g} with any of {len(losses)} ranges: it does not depend on them, and nothing is "
            "optimized; look at the batches, and at what loss= computes of the output that it is given",
            NoEffectWarning,
            stacklevel=3,
        )
    if start < before:
        take(rules[power])
    else:
        _restore(given)
    searched = [q for q, _, _ in known if _is_searched(q)]
    after = search_factors(searched, measure, start, evaluations) if searched and evaluations else start
    return OptimizedRanges(
        before,
        tuple(losses),
        tuple(losses.values()),
        power if start < before else None,
        after,
        measure.evaluations,
    )


def _fit(quantizer: Quantizer, samples: Samples, signed: bool, rule: Lp) -> None:
    """Give the range that the rule finds for the quantizer's own widths, all channels at once."""
    spec = quantizer.spec
    symmetric = bool((quantizer.zero_point == middle(quantizer.bits)).all()) if spec is None else spec.symmetric
    bits = quantizer.bits.reshape(-1).to(samples.values.device)
    levels = Levels(bits, symmetric, signed, spec is not None and spec.power_of_two)
    step, zero_point = levels.fit(*rule(samples, levels))
    quantizer.log2_step.copy_(torch.log2(step).view(quantizer.log2_step.shape))
    quantizer.zero_point.copy_(zero_point.view(quantizer.zero_point.shape))
    quantizer.refresh()


def _is_searched(quantizer: Quantizer) -> bool:
    """Whether Powell's method has a variable for the range: one that matters, and may be any number."""
    free = quantizer.spec is None or not quantizer.spec.power_of_two
    return free and 0 < float(quantizer.bits.max()) < _MANY_BITS


def _ranges(model: nn.Module) -> _State:
    """Copies of the ranges of all quantizers."""
    return [(q, q.log2_step.detach().clone(), q.zero_point.detach().clone()) for q in quantizers(model)]


def _have_moved(ranges: _State) -> bool:
    """Whether any quantizer has another range than these."""
    return any(not torch.equal(q.log2_step, step) or not torch.equal(q.zero_point, zero) for q, step, zero in ranges)


@torch.no_grad()
def _restore(ranges: _State) -> None:
    """Give quantizers the ranges they had."""
    for quantizer, log2_step, zero_point in ranges:
        quantizer.log2_step.copy_(log2_step)
        quantizer.zero_point.copy_(zero_point)
        quantizer.refresh()


def _check_calibrated(model: nn.Module) -> None:
    """Raise if a range, or the values behind the range of an activation, are not known."""
    without = [q.name for q in quantizers(model) if not (q.calibrated or q.unreached)]
    if without:
        raise StateError(
            f"lq.optimize_ranges needs calibrated quantizers, {len(without)} have no range ({', '.join(without[:3])}); "
            "call lq.calibrate(model, batches) first, and exclude layers that the forward never uses from lq.attach"
        )
    for site in activation_quantizers(model).values():
        if site.calibrated:
            site.samples()
