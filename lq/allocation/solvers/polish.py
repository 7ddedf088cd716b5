r"""Improve a choice: spend what the limits leave, then search the items whose decision is close.

*Refill* takes the upgrades that gain most per unit of priced cost and still fit, until none does. The search
(`lq.allocation.solvers.core`) then looks for choices that lose at most ``within`` more than the bound, for growing
``within``: the smaller it is, the fewer options count and the more likely the search is complete. A complete search
that finds nothing raises the bound by ``within``; one that finds a choice has found the optimum.
"""

import numpy as np

from lq.allocation.solvers.core import search
from lq.allocation.solvers.dual import dual_bound
from lq.allocation.solvers.problem import ROUNDING, Floats, Ints, Problem, Solution

_WIDER = 4.0
_ROUNDS = 3


def polish(problem: Problem, choice: Ints, prices: Floats, *, items: int = 512, states: int = 2**19) -> Solution:
    """Improve a choice within the limits.

    Args:
        problem: what to allocate.
        choice: option of each item, shape (items,).
        prices: of a unit of each cost, shape (constraints,); see `lq.allocation.solvers.dual.dual_prices`.
        items: greatest number of items searched.
        states: greatest number of states of the search, all items together.
    """
    bound = proved = dual_bound(problem, prices)
    choice = refill(problem, choice, prices)
    loss = problem.loss(choice)
    rounding = 2 * ROUNDING * (abs(loss) + float(problem.totals(choice) @ prices))
    if loss - bound <= rounding:
        return problem.solution(choice, loss)
    within = (loss - bound) / _WIDER**_ROUNDS
    while True:
        within = min(within, loss - bound)
        choice, complete = search(problem, choice, prices, within, items=items, states=states)
        loss = problem.loss(choice)
        found = loss - bound <= within
        if complete:
            proved = loss if found else bound + within
        if found:
            return problem.solution(refill(problem, choice, prices), proved)
        within *= _WIDER


def refill(problem: Problem, choice: Ints, prices: Floats) -> Ints:
    """Upgrade items while something fits; those first that gain most per unit of priced cost.

    Every round takes, from the best upgrade of each item, as many as fit together.
    """
    rows = np.arange(len(choice))
    while True:
        left = problem.ceilings - problem.totals(choice)
        extra = problem.costs - problem.costs[:, rows, choice][:, :, None]
        gain = problem.losses[rows, choice][:, None] - problem.losses
        fits = (gain > 0) & (extra <= left[:, None, None]).all(0)
        price = np.tensordot(prices, extra, 1)
        least = 1e-9 * price.max() if price.max() > 0 else 1.0  # of upgrades that are free, the most gain
        rate = np.where(fits, gain, 0.0) / np.maximum(price, least)
        option = rate.argmax(1)
        items = np.flatnonzero(fits.any(1))
        items = items[(-rate[items, option[items]]).argsort(kind="stable")]
        together = (extra[:, items, option[items]].cumsum(1) <= left[:, None]).all(0)
        count = len(items) if together.all() else max(1, int(together.argmin()))
        upgraded = choice.copy()
        upgraded[items[:count]] = option[items[:count]]
        if not items.size or not problem.meets(upgraded):  # nothing fits, or only by rounding
            return choice
        choice = upgraded
