"""Random problems, and what enumeration says about them."""

from itertools import product

import numpy as np

from lq.allocation.solvers import Problem

WIDTHS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 16])


def realistic(seed, items, constraints=1, share=None):
    """Losses fall by 4 per bit, times noise; sizes and sensitivities over decades; limits anywhere between the ends."""
    rng = np.random.default_rng(seed)
    losses = 10 ** rng.normal(0, 1.5, (items, 1)) * 4.0**-WIDTHS * np.exp(rng.normal(0, 0.3, (items, 9)))
    sizes = 10 ** (rng.normal(4, 1, items) + rng.normal(0, 0.7, (constraints, items)))
    costs = sizes[:, :, None] * WIDTHS
    share = rng.uniform(0.02, 0.98, constraints) if share is None else share
    return Problem(losses, costs, _between(costs, share))


def integers(seed, items, constraints=1, options=9):
    """Small random integers: many ties, no convexity, and limits that no allocation may meet together."""
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 20, (items, options)).astype(float)
    costs = rng.integers(1, 20, (constraints, items, options)).astype(float)
    return Problem(losses, costs, np.floor(_between(costs, rng.uniform(0.02, 0.98, constraints))))


def ragged(seed, items, constraints=1, options=4):
    """Small integers with options missing."""
    whole = integers(seed, items, constraints, options)
    missing = np.random.default_rng(seed + 1).random((items, options)) < 0.4
    missing[np.arange(items), seed % options] = False
    losses = np.where(missing, np.inf, whole.losses)
    kept = np.where(missing, np.nan, whole.costs)
    return Problem(losses, kept, np.floor((np.nanmin(kept, 2).sum(1) + np.nanmax(kept, 2).sum(1)) / 2))


def _between(costs, share):
    least, greatest = costs.min(2).sum(1), costs.max(2).sum(1)
    return least + share * (greatest - least)


def enumerated(problem):
    """The least loss of all choices within the limits, by trying each; inf if there is none."""
    best = np.inf
    for choice in product(*(np.flatnonzero(row < np.inf) for row in problem.losses)):
        picked = list(enumerate(choice))
        totals = [sum(cost[i][j] for i, j in picked) for cost in problem.costs.tolist()]
        if all(total <= limit * (1 + 1e-9) for total, limit in zip(totals, problem.limits, strict=True)):
            best = min(best, sum(problem.losses[i, j] for i, j in picked))
    return best
