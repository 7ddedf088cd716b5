"""Powell's method on log2 of a factor for each range: the last stage of LAPQ (`lq.calibration.loss_aware`)."""

import math
from contextlib import suppress
from typing import Any

import numpy as np
from scipy.optimize import Bounds, minimize

from lq.calibration.network_loss import NetworkLoss
from lq.quantizer.quantizer import Quantizer

# log2 of the smallest and largest factor on a step. A golden section of this interval probes 0 first.
_BOX = ((1 - math.sqrt(5)) / 2, 1.0)
# Powell's tolerances: of a line search, in log2 of a factor; of the loss, relative, over all lines.
_TOLERANCE, _LOSS_TOLERANCE = 0.1, 1e-3
# What an infinite loss counts as: the parabolas of a line search cannot do with infinity.
_HUGE = 1e30


class _Enough(Exception):  # noqa: N818
    """The evaluations are used up."""


def search_factors(searched: list[Quantizer], measure: NetworkLoss, start: float, evaluations: int) -> float:
    """Search factors on the steps of quantizers, leave them at the best seen, and return its loss."""
    begin = [q.log2_step.detach().clone() for q in searched]
    last = measure.evaluations + evaluations
    current = np.zeros(len(searched))
    seen = {current.tobytes(): start}
    best, least = current, start

    def take(logs: np.ndarray[Any, Any]) -> None:
        nonlocal current
        for i in np.flatnonzero(logs != current):  # what has not changed keeps its rounded weight
            searched[i].log2_step.copy_(begin[i] + float(logs[i]))
        current = logs.copy()

    def objective(logs: np.ndarray[Any, Any]) -> float:
        nonlocal best, least
        logs = logs.round(6) + 0.0  # a probe of the present point is known by its bytes: no -1e-17, no -0.0
        key = logs.tobytes()
        if key not in seen:
            if measure.evaluations >= last:
                raise _Enough
            take(logs)
            seen[key] = measure()
            if seen[key] < least:
                best, least = current, seen[key]
        return min(seen[key], _HUGE)

    lower, upper = (np.full(len(searched), end) for end in _BOX)
    options = {"xtol": _TOLERANCE, "ftol": _LOSS_TOLERANCE}
    with suppress(_Enough):
        minimize(objective, current, method="Powell", bounds=Bounds(lower, upper), options=options)
    take(best)
    return least
