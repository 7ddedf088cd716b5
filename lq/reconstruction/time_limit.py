"""Iterations by the clock: as many for each unit as fit into a time, by the speed that was measured."""

import time
import warnings
from collections.abc import Sequence

import torch

from lq.reconstruction.engine import seconds_of_step
from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import Problem

# Iterations that a unit gets however little time is left.
_LEAST = 10


class TimeLimit:
    """Chooses the iterations of each unit; time that one leaves, or takes too long, is the next ones'.

    Args:
        options: with the limit in minutes; ``iterations`` are never exceeded.
        costs: about what an iteration of each unit costs, in any unit; 0 if it is done.
    """

    def __init__(self, options: RunOptions, costs: Sequence[float]) -> None:
        self.options, self.costs = options, costs
        self.begin = time.perf_counter()
        self._paid = 0.0  # iterations times cost, of units that are done

    def iterations(self, k: int, problem: Problem) -> int:
        """The iterations of unit k, the same on all ranks."""
        if self.options.minutes is None:
            return self.options.iterations
        taken = time.perf_counter() - self.begin
        rate = taken / self._paid if self._paid else seconds_of_step(problem, self.options) / max(self.costs[k], 1e-9)
        taken = time.perf_counter() - self.begin
        if self.options.reduce is not None and self.options.ranks > 1:
            times = torch.tensor([taken, rate], dtype=torch.float64, device=problem.inputs.device)
            taken, rate = self.options.reduce(times, "max").tolist()
        left = max(60 * self.options.minutes - taken, 0.0)
        count = int(left / max(rate * sum(self.costs[k:]), 1e-9))
        if count < _LEAST:
            warnings.warn(
                f"minutes={self.options.minutes:g} is too little for unit {problem.name}: it gets {_LEAST} iterations "
                "all the same; give more minutes",
                stacklevel=2,
            )
        count = min(max(count, _LEAST), self.options.iterations)
        self._paid += count * self.costs[k]
        return count
