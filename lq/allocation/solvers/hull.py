r"""The lower convex hull of every item's (cost, loss) points, and the walk down it.

From the option of least loss, each step goes to the cheaper option that loses least per unit saved, ``(losses[i, k] -
losses[i, j]) / (cost[i, j] - cost[i, k])``; steps of an item get steeper. Dominated options (another costs no more and
loses no more) are never met. All items walk at once: as many rounds as there are options, no loop over items.
"""

from dataclasses import dataclass

import numpy as np

from lq.allocation.solvers.problem import Floats, Ints, Problem


@dataclass(frozen=True, eq=False)
class Hull:
    """The steps down all hulls, the one that loses least per unit saved first.

    Args:
        start: the option of least loss (the cheapest of equals) of each item, shape (items,).
        items: whose step it is, shape (steps,).
        origins: option it leaves, shape (steps,).
        targets: option it goes to, shape (steps,).
        slopes: loss per unit of cost saved, ascending, shape (steps,).
    """

    start: Ints
    items: Ints
    origins: Ints
    targets: Ints
    slopes: Floats

    def after(self, steps: int) -> Ints:
        """The choice after that many steps, shape (items,)."""
        choice: Ints = self.start.copy()
        choice[self.items[:steps]] = self.targets[:steps]  # the last of an item's steps counts
        return choice


def hull(losses: Floats, cost: Floats) -> Hull:
    """Find the hull of each item.

    Args:
        losses: shape (items, options); ``inf`` marks options that do not exist.
        cost: shape (items, options).

    >>> steps = hull(np.array([[9.0, 3.0, 2.5, 1.0]]), np.array([[1.0, 2.0, 3.0, 4.0]]))
    >>> steps.start, steps.targets, steps.slopes
    (array([3]), array([1, 0]), array([1., 6.]))
    """
    start = np.where(losses == losses.min(1, keepdims=True), cost, np.inf).argmin(1)
    items, now, last = np.arange(len(losses)), start, np.zeros(len(losses))
    rounds: list[tuple[Ints, Ints, Ints, Floats]] = []
    while items.size or not rounds:
        saved = np.take_along_axis(cost[items], now[:, None], 1) - cost[items]
        lost = losses[items] - np.take_along_axis(losses[items], now[:, None], 1)
        cheaper = (saved > 0) & (lost < np.inf)
        slopes = np.divide(lost, saved, out=np.full_like(lost, np.inf), where=cheaper)
        least = slopes.min(1)
        reach = np.where(cheaper & (slopes == least[:, None]), saved, 0.0)
        target = reach.argmax(1)  # of equals, the one that saves most
        live = least < np.inf
        items, origin, now = items[live], now[live], target[live]
        last = np.maximum(last[live], least[live])  # rounding must not put an item's steps out of order
        rounds.append((items, origin, now, last))
    parts = [np.concatenate(part) for part in zip(*rounds, strict=True)]
    order = parts[3].argsort(kind="stable")
    return Hull(start, *(part[order] for part in parts))


def descend(problem: Problem, weights: Floats) -> tuple[Ints, float] | None:
    """Walk down the hulls of the weighted sum of costs until all limits are met.

    Args:
        problem: what to allocate.
        weights: value of a unit of each cost, shape (constraints,).

    Returns:
        The choice, shape (items,), and the slope of the last step; None if no step meets all limits.
    """
    steps = hull(problem.losses, np.tensordot(weights, problem.costs, 1))
    saved = problem.costs[:, steps.items, steps.origins] - problem.costs[:, steps.items, steps.targets]
    totals = problem.totals(steps.start)[:, None] - np.c_[np.zeros(len(saved)), saved.cumsum(1)]
    nearly = totals <= problem.ceilings[:, None] + 1e-12 * totals[:, :1]  # the running sum is rounded: look again
    for count in np.flatnonzero(nearly.all(0)):
        choice = steps.after(int(count))
        if problem.meets(choice):
            return choice, float(steps.slopes[count - 1]) if count else 0.0
    return None
