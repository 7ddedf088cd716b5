r"""Search the items whose decision is close, all others decided.

With ``prices`` of the limits, a choice loses ``bound + sum_i reduced[i, x_i] + prices . (limits - totals)``, no term of
which is negative within the limits (see `lq.allocation.solvers.dual`). So an option whose reduced loss is not below
``within`` is in no choice that loses less than ``bound + within``, and for most items only one option is left. The
choices of the others, the *core* (Pisinger, European Journal of Operational Research 83, 1995), are enumerated item by
item; the state after some items is what they cost and lose. States are dropped that cannot end below ``bound +
within`` (if items could be split, the rest would lose too much) or within the limits, and, once a single limit is left
that may bind, those that another state dominates (costs and loses no more).

What deviates from the exact method: the numbers of items and of states are limited. Items stay that move most of the
priced cost for their reduced loss; states stay that may end best, from each cell of a grid over the costs the best
first. Where nothing was left out, the search says it is complete.
"""

import numpy as np
from numpy.typing import NDArray

from lq.allocation.solvers.dual import reduced_losses
from lq.allocation.solvers.hull import hull
from lq.allocation.solvers.problem import ROUNDING, Floats, Ints, Problem

_ANSWERS = 16


def search(
    problem: Problem, choice: Ints, prices: Floats, within: float, *, items: int = 512, states: int = 2**19
) -> tuple[Ints, bool]:
    """Look for a choice that loses less than `choice` and less than ``bound + within``.

    Args:
        problem: what to allocate.
        choice: option of each item, within the limits; shape (items,).
        prices: of a unit of each cost, shape (constraints,).
        within: what the choice may lose above the bound that the prices prove; positive.
        items: greatest number of items searched.
        states: greatest number of states, all items together.

    Returns:
        The best choice met, shape (items,), and whether it is certain that there is no better one.
    """
    rows = np.arange(len(choice))
    reduced = reduced_losses(problem, prices)
    base = np.where(reduced[rows, choice] <= 0, choice, reduced.argmin(1))
    reduced = np.where(reduced < within, reduced, np.inf)
    extra = problem.costs - problem.costs[:, rows, base][:, :, None]
    priced = np.tensordot(prices, extra, 1)
    core, complete = _closest(reduced / np.clip(np.abs(priced), 1e-9 * within, within), choice, base, items)
    swing = np.where(reduced[core] < within, np.abs(priced[core]), 0.0).max(1)
    core = core[(-swing).argsort(kind="stable")]  # the last items fill what the large ones leave

    options = [np.flatnonzero(reduced[i] < within) for i in core]
    steps = [extra[:, i, o] for i, o in zip(core, options, strict=True)]
    least, greatest = (_after([getattr(step, end)(1) for step in steps]) for end in ("min", "max"))
    up, down = _Moves(reduced[core], priced[core]), _Moves(reduced[core], -priced[core])
    left = (problem.ceilings - problem.totals(base))[:, None]
    rounding = ROUNDING * problem.greatest_costs[:, None]
    value = prices @ np.where(left < np.inf, left, 0.0)
    spent, lost, above = np.zeros((len(left), 1)), np.zeros(1), np.zeros(1)
    history: list[NDArray[np.int32]] = []
    for k, (i, o) in enumerate(zip(core, options, strict=True)):
        spent = (spent[:, :, None] + steps[k][:, None]).reshape(len(left), -1)
        lost = (lost[:, None] + problem.losses[i, o] - problem.losses[i, base[i]]).ravel()
        above = (above[:, None] + reduced[i, o]).ravel()
        unused = value - prices @ spent
        rest = up.least(unused, k, 1.0) + down.least(-unused - prices @ rounding, k, np.inf)
        ends = above + rest  # no state ends with less above the bound
        kept = np.flatnonzero((ends < within) & (spent + least[k] <= left + rounding).all(0))
        binding = np.flatnonzero((spent[:, kept] + greatest[k] > left).any(1))
        kept = kept[_undominated(spent[np.ix_(binding, kept)], lost[kept])]
        if len(kept) > states // len(core):
            kept = kept[_spread(spent[np.ix_(binding, kept)], ends[kept], states // len(core))]
            complete = False
        history.append(kept.astype(np.int32))
        spent, lost, above = spent[:, kept], lost[kept], above[kept]

    for answer in lost.argsort(kind="stable")[:_ANSWERS]:
        found, state = base.copy(), int(answer)
        for i, o, before in zip(core[::-1], options[::-1], history[::-1], strict=True):
            state, option = divmod(int(before[state]), len(o))
            found[i] = o[option]
        if problem.loss(found) >= problem.loss(choice):
            break
        if problem.meets(found):
            return found, complete
        complete = False  # within the limits by rounding only; it may have dominated one that is
    return choice, complete


class _Moves:
    """What items lose at least to move their priced cost up, if they could be split.

    Args:
        reduced: reduced loss of each option, ``inf`` for those ruled out; shape (items, options).
        priced: what each option adds to the priced cost, same shape.
    """

    def __init__(self, reduced: Floats, priced: Floats) -> None:
        steps, rows = hull(reduced, -priced), np.arange(len(reduced))
        moved = priced[steps.items, steps.targets] - priced[steps.items, steps.origins]
        self.items = np.r_[rows, steps.items]
        self.reach = np.r_[priced[rows, steps.start], moved]  # first to options that lose as little as the base
        self.rates = np.r_[np.zeros(len(rows)), steps.slopes]

    def least(self, amounts: Floats, after: int, otherwise: float) -> Floats:
        """The least loss for each amount, by the items after the given one; beyond these a unit loses `otherwise`."""
        steps = (self.items > after) & (self.rates < otherwise)
        reached = np.r_[0.0, self.reach[steps].cumsum()]
        lost = np.r_[0.0, (self.reach[steps] * self.rates[steps]).cumsum()]
        beyond = amounts > reached[-1]
        rest = np.multiply(amounts - reached[-1], otherwise, out=np.zeros_like(amounts), where=beyond)
        total: Floats = np.interp(amounts, reached, lost) + rest
        return total


def _closest(rates: Floats, choice: Ints, base: Ints, most: int) -> tuple[Ints, bool]:
    """The undecided items, and whether these are all: first those that moved from `base`, then the least rates."""
    rates[np.arange(len(base)), base] = np.inf
    nearest = rates.min(1)
    core = np.flatnonzero(nearest < np.inf)
    order = np.lexsort((nearest[core], choice[core] == base[core]))
    return core[order[:most]], len(core) <= most


def _after(ends: list[Floats]) -> list[Floats]:
    """What the items after each one can add at most (or at least), a column of costs for each."""
    sums = [np.zeros_like(end) for end in ends[:1]]
    for end in ends[:0:-1]:
        sums.append(sums[-1] + end)
    return [one[:, None] for one in reversed(sums)]


def _undominated(spent: Floats, lost: Floats) -> Ints:
    """Indices of the states to keep: the best without limits, those on the front with one limit, all with more."""
    if not lost.size or len(spent) > 1:
        return np.arange(lost.size)
    order = np.lexsort((lost, spent[0])) if len(spent) else lost.argsort(kind="stable")[:1]
    best = np.minimum.accumulate(lost[order])
    front: NDArray[np.bool_] = np.r_[True, lost[order][1:] < best[:-1]]
    return order[front]


def _spread(spent: Floats, rank: Floats, most: int) -> Ints:
    """Indices of `most` states: the best of each cell of a grid over their costs, then the best of the others."""
    cells = int(most ** (1 / len(spent)))
    low, high = spent.min(1, keepdims=True), spent.max(1, keepdims=True)
    place = (spent - low) / np.maximum(high - low, np.finfo(np.float64).tiny) * cells
    cell = np.ravel_multi_index(tuple(np.minimum(place, cells - 1).astype(np.int64)), (cells,) * len(spent))
    order = np.lexsort((rank, cell))
    again = np.empty(len(rank), dtype=np.bool_)
    again[order] = np.r_[False, np.diff(cell[order]) == 0]
    return np.lexsort((rank, again))[:most]
