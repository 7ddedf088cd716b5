"""Allocation with cross terms: from the additive choice to one that counts what items lose together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lq.allocation.counting import Choice
from lq.allocation.solvers import Problem, Solution
from lq.allocation.solvers.products import Merged
from lq.allocation.solvers.quadratic import Quadratic, minimize, share_of
from lq.errors import DataError, SpecError
from lq.sensitivity.table import Sensitivity

# Of the share that is no chance: a minimum over many choices seeks out what chance is left.
_CAUTION = 0.5


def crossed(
    problem: Problem, start: Solution, merged: Merged, items: Sequence[Choice], sensitivity: Sensitivity
) -> Solution:
    """Improve an additive choice with the cross terms that were measured.

    Raises:
        DataError: if none were.
        SpecError: if widths of several items are chosen together.
    """
    if sensitivity.terms is None:
        raise DataError(
            "the sensitivity has no cross terms: measure it by measure_sensitivity(..., cross_terms=True) in the same "
            "process (a saved sensitivity does not keep them)"
        )
    if len(merged.groups) != len(items):
        raise SpecError(
            "cross_terms=True does not go with a budget of bit operations by which widths of weights and activations "
            "are chosen together; give activations a mean width, or keep their widths"
        )
    kept = sensitivity.terms
    rows = kept[items[0].tensor.name].shape[2]
    terms = np.zeros((*problem.losses.shape, rows), dtype=np.float32)
    for row, (item, options) in enumerate(zip(items, merged.choices, strict=True)):
        terms[row, : len(options)] = _terms(kept[item.tensor.name], item, sensitivity.group)[options[:, 0]]
    share = _CAUTION * share_of(terms[np.arange(len(items)), start.choice].astype(np.float64))
    return minimize(Quadratic(problem, terms, share), start.choice)


def _terms(kept: NDArray[np.float32], item: Choice, group: int) -> NDArray[np.float32]:
    """The terms of an item at each width, (W, rows)."""
    found: NDArray[np.float32] = kept.sum(0) if item.channels is None else kept[item.channels.start // group]
    return found
