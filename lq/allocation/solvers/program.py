r"""The optimum, by the mixed-integer solver HiGHS on what the bounds leave undecided.

A choice loses ``bound + sum_i reduced[i, x_i] + prices . unused`` (see `lq.allocation.solvers.core`), so options whose
reduced loss is not below ``gap = loss - bound`` of a polished choice are in no better one and are deleted, which
decides most items of a large problem. With one limit, the search of the core usually proves the rest. Else it is
solved with ``reduced / gap`` as losses and the unused part of each limit as a variable: whatever the units, losses and
costs are within [0, 1], and the solver's absolute tolerances (1e-6) are shares of the gap. Its answer is added up
again in full precision; one that rounding let through above a limit is forbidden, and the solver runs again.
"""

import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from lq.allocation.solvers.dual import dual_bound, reduced_losses
from lq.allocation.solvers.polish import polish
from lq.allocation.solvers.problem import Floats, Ints, Problem, Solution

_STATES = 2**25
_OPTIMAL, _INFEASIBLE = 0, 2  # what `scipy.optimize.milp` calls its outcomes


def optimal(problem: Problem, start: Ints, prices: Floats, seconds: float) -> Solution:
    """Return the optimal choice, or after `seconds` the best so far with the bound proved so far.

    Args:
        problem: what to allocate.
        start: option of each item, within the limits; shape (items,).
        prices: of a unit of each cost, shape (constraints,).
        seconds: time limit of the solver.
    """
    end = time.monotonic() + seconds
    best = polish(problem, start, prices)
    binding = np.flatnonzero(problem.greatest_costs > problem.ceilings)
    if best.gap and len(binding) == 1:
        best = polish(problem, best.choice, prices, items=len(start), states=_STATES)
    return _solve(problem, best, prices, binding, end) if best.gap else best


def _solve(problem: Problem, best: Solution, prices: Floats, binding: Ints, end: float) -> Solution:
    """Find a better choice than the best so far, or prove that there is none, until the clock says `end`."""
    base = dual_bound(problem, prices)
    gap = best.loss - base
    reduced = reduced_losses(problem, prices)
    items, options = np.nonzero(reduced < gap)
    costs = problem.costs[binding][:, items, options]
    firsts = np.flatnonzero(np.r_[True, np.diff(items) > 0])  # every item has an option without reduced loss
    least = np.minimum.reduceat(costs, firsts, axis=1)
    extra = costs - least[:, items]
    unit = np.where(extra.max(1) > 0, extra.max(1), 1.0)
    room = (problem.ceilings[binding] - least.sum(1)) / unit

    count, total = len(items), len(items) + len(binding)
    one_each = coo_matrix((np.ones(count), (items, np.arange(count))), shape=(len(reduced), total))
    spend = np.c_[extra / unit[:, None], np.eye(len(binding))]
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(spend, room, room)]
    whole = np.arange(total) < count
    while (left := end - time.monotonic()) > 0:
        answer = milp(
            np.r_[reduced[items, options], prices[binding] * unit] / gap,
            integrality=whole,
            bounds=Bounds(0, np.where(whole, 1, np.inf)),
            constraints=constraints,
            options={"mip_rel_gap": 0, "time_limit": left},
        )
        if answer.status == _INFEASIBLE:
            return problem.solution(best.choice, best.loss)
        bound = best.bound if answer.mip_dual_bound is None else max(best.bound, base + gap * answer.mip_dual_bound)
        if answer.x is None:
            return problem.solution(best.choice, bound)
        picked = np.flatnonzero(answer.x[:count] > 0.5)
        choice = best.choice.copy()
        choice[items[picked]] = options[picked]
        if problem.meets(choice):
            better = min(choice, best.choice, key=problem.loss)
            return problem.solution(better, problem.loss(better) if answer.status == _OPTIMAL else bound)
        forbidden = np.zeros((1, total))
        forbidden[0, picked] = 1
        constraints.append(LinearConstraint(forbidden, 0, len(picked) - 1))
    return best
