"""`measure_sensitivity`: what each width of each tensor of a quantized model costs, by the metric of choice."""

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lq.attachment.float_models import float_model
from lq.attachment.sites import require_attached
from lq.bars import steps
from lq.errors import DataError, NoEffectWarning, SpecError
from lq.quantizer.histogram import Reduce
from lq.quantizer.spec import check_bits
from lq.sensitivity.brute_force import BruteForce
from lq.sensitivity.hawq import HawqV2
from lq.sensitivity.metric import Metric
from lq.sensitivity.metrics import Fisher, OutputDistortion
from lq.sensitivity.reading import Reading
from lq.sensitivity.table import Found, Sensitivity
from lq.sensitivity.tensors import find_tensors
from lq.structure.batch_layout import FIRST, Layout, find_layout
from lq.structure.forward import Forward, run
from lq.structure.outputs import require_loss, require_output
from lq.structure.recomputation import without_recomputation

#: Widths measured unless others are asked for.
WIDTHS = tuple(range(9))

#: Metrics by name.
METRICS: dict[str, Callable[[], Metric]] = {
    "fisher": Fisher,
    "model_fisher": lambda: Fisher("model", temperature=2.0),
    "output_distortion": OutputDistortion,
    "hawq_v2": HawqV2,
    "kl": lambda: BruteForce("kl"),
}


def metric_of(metric: "str | Metric") -> Metric:
    """The metric itself, or the one of that name.

    >>> metric_of("fisher")
    Fisher(labels='data', temperature=1.0, loss=None)
    """
    if not isinstance(metric, str):
        return metric
    if metric not in METRICS:
        raise SpecError(f"sensitivity={metric!r} is unknown; use {', '.join(map(repr, METRICS))} or a metric object")
    return METRICS[metric]()


def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str | Metric = "fisher",
    *,
    widths: Sequence[int] = WIDTHS,
    group: int = 1,
    weights: bool = True,
    activations: bool = True,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
    seed: int = 0,
    batch_dim: int | None = None,
    cross_terms: bool = False,
) -> Sensitivity:
    """Measure what each width of each weight channel and each activation of `model` costs.

    The costs are those of the float network: quantizers stay as they are, and none rounds meanwhile.

    Args:
        model: a model with quantizers, calibrated if activations are measured; runs in eval mode.
        batches: any iterable of batches, read once; a few hundred samples are enough.
        metric: "fisher" (MPQCO), "model_fisher" (of the model's own labels, softened: ``Fisher("model", 2.0)``),
            "output_distortion" (RDO-Q), "hawq_v2", "kl" (ZeroQ), or an object such as ``BruteForce("loss")``.
        widths: widths to measure, in bits.
        group: number of adjacent output channels that are measured together, besides the whole tensor.
        weights: whether to measure weights.
        activations: whether to measure activations.
        forward: called with the model and a batch, returns the output; by default as in `lq.calibrate`. Of several
            outputs the one called "logits" counts, or else the first that is no single number. Labels are
            ``batch[1]``.
        reduce: combines a tensor over ranks: called with it and "sum", "min" or "max".
        seed: of the random vectors; the caller's random state is left alone.
        batch_dim: dimension of the inputs in which samples lie; by default it is found out, by input, labels and output
            of the first batch.
        cross_terms: also keep what ``lq.allocate(..., cross_terms=True)`` needs: the term of every group of channels at
            every width for up to 1 024 rows of samples, at most about half a gigabyte. Of metrics that one pass
            measures, on one rank.

    Raises:
        StateError: if the model has no quantizers, or its activations were not calibrated.
        DataError: if there are no batches, the model does not take one, labels are missing or do not fit, it cannot be
            told what a sample is, or nothing that was measured depends on widths.
        SpecError: for a width or metric that does not exist.

    >>> import lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(4, 3)), weights=4)
    >>> table = measure_sensitivity(model, [(torch.randn(8, 4), torch.randint(3, (8,)))], activations=False)
    >>> table["0.weight"].loss.shape, table["0.weight"].group_loss.shape
    ((9,), (3, 9))
    """
    require_attached(model, "lq.measure_sensitivity")
    chosen = metric_of(metric)
    if group < 1:
        raise SpecError(f"group={group}; a group has at least 1 channel")
    if cross_terms and (reduce is not None or not getattr(chosen, "finds_cross_terms", False)):
        why = "several ranks" if reduce is not None else type(chosen).__name__
        able = ", ".join(repr(name) for name in METRICS if metric_of(name).finds_cross_terms)
        raise SpecError(f"cross_terms=True is not known of {why}; measure on one rank by {able}")
    if not widths:
        raise SpecError("widths is empty; give at least one width")
    tensors = find_tensors(model, [check_bits(width) for width in widths], weights=weights, activations=activations)
    if not tensors:
        raise SpecError("neither weights nor activations of the model are quantized as asked; nothing can be measured")
    with torch.random.fork_rng(), without_recomputation(model):
        count = operator.length_hint(batches)
        batches = iter(batches)
        first = list(itertools.islice(batches, 1))
        layout = _layout(model, first[0], chosen, forward, batch_dim) if first else FIRST
        torch.manual_seed(seed)
        reading = Reading(forward, layout, group, reduce, cross_terms)
        left = operator.length_hint(batches)
        total = count or (len(first) + left if left else None)
        every = steps(itertools.chain(first, batches), "Measuring sensitivity", total=total)
        found = chosen.measure(model, tensors, every, reading)
    unseen = [tensor.name for tensor in tensors if not tensor.seen]
    if unseen:
        warnings.warn(
            f"{len(unseen)} tensors were never used by the forward ({', '.join(unseen[:3])}, ...): nothing is known of "
            "them, an allocation leaves them the widths they have",
            NoEffectWarning,
            stacklevel=2,
        )
    _check_values(found)
    notes = (*found.notes, layout.note) if layout.note else found.notes
    known = tuple(tensor for tensor in found.tensors if tensor.name not in unseen or tensor.loss.any())  # on any rank
    terms = None
    if found.terms is not None:
        names = [tensor.name for tensor in tensors]
        terms = {name: kept for name, kept in zip(names, found.terms, strict=True) if name not in unseen}
    return Sensitivity(type(chosen).__name__, tuple(widths), found.samples, group, known, notes, terms=terms)


def _layout(model: nn.Module, batch: Any, metric: Metric, forward: Forward | None, batch_dim: int | None) -> Layout:
    """Where the samples of batches like this one lie, by runs of the float model on two of them."""
    loss = getattr(metric, "loss", None)
    with float_model(model), torch.no_grad():
        if loss is not None:
            return find_layout(batch, lambda part: require_loss(loss(model, part)), batch_dim, is_loss=True)
        return find_layout(batch, lambda part: require_output(run(model, part, forward)), batch_dim)


def _check_values(found: Found) -> None:
    """Raise if what was measured says nothing of widths.

    Raises:
        DataError: if sensitivities are no numbers, or all of them are zero.
    """
    wrong = [t.name for t in found.tensors if not np.isfinite(t.loss).all()]
    if wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise DataError(
            f"sensitivities of {len(wrong)} of {len(found.tensors)} tensors are no finite numbers ({names}); look for "
            "NaN or Inf in batches, weights and the loss"
        )
    if not any(t.loss.any() for t in found.tensors):
        raise DataError(
            f"nothing changes with the widths of any of {len(found.tensors)} tensors: the gradient is zero for all of "
            f"{found.samples} samples, so that the labels (or the loss) say nothing of the model; look at the labels "
            "in the batches, or pass forward= or a metric with a loss= that depends on the model"
        )
