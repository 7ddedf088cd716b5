r"""What a unit of each cost is worth at the best: the multipliers of the limits, and the bound they prove.

``g(prices) = sum_i min_j (losses[i, j] + prices . costs[:, i, j]) - prices . limits`` bounds every allocation from
below (Everett, Operations Research 11, 1963). It is concave and piecewise linear; with one limit its maximum is a slope
of the hull, with several it is found by cutting planes (Kelley 1960): each evaluation adds a plane above ``g``, and a
linear program of one variable per limit says where to look next. Prices are searched in units of those that each limit
would have alone, halfway between the best seen and where the planes meet, which keeps the search from jumping about.
"""

import numpy as np
from scipy.optimize import linprog

from lq.allocation.solvers.hull import descend
from lq.allocation.solvers.problem import Floats, Ints, Problem

_PLANES = 100
_PRECISION = 1e-7  # of the rise from no prices to the best
_BOX = 1e3  # prices may exceed those of their limit alone by this factor


def reduced_losses(problem: Problem, prices: Floats) -> Floats:
    """What each option loses above the best of its item, its costs paid for; shape (items, options), at least 0."""
    paid = problem.losses + np.tensordot(prices, problem.costs, 1)
    reduced: Floats = paid - paid.min(1, keepdims=True)
    return reduced


def priced_choice(problem: Problem, prices: Floats) -> Ints:
    """The best option of each item when costs have prices, shape (items,); of equals, the first."""
    choice: Ints = reduced_losses(problem, prices).argmin(1)
    return choice


def dual_bound(problem: Problem, prices: Floats) -> float:
    """The lower bound of the loss of every allocation within the limits that these prices prove."""
    choice = priced_choice(problem, prices)
    return problem.loss(choice) + float(_excess(problem, choice) @ prices)


def dual_prices(problem: Problem) -> Floats:
    """The prices that prove the highest bound, shape (constraints,); 0 for limits that do not bind.

    Every limit must be feasible alone.

    >>> dual_prices(Problem(losses=[[3, 1], [5, 0]], costs=[[[1, 4], [1, 4]]], limits=[5]))
    array([0.66666667])
    """
    prices = np.zeros(len(problem.limits))
    binding = np.flatnonzero(problem.greatest_costs > problem.ceilings)
    prices[binding] = [_price_alone(problem, int(c)) for c in binding]
    return prices if binding.size <= 1 else _cutting_planes(problem, binding, prices[binding])


def _excess(problem: Problem, choice: Ints) -> Floats:
    """How far each total is above its limit, shape (constraints,); 0 for limits that cannot bind."""
    return np.where(problem.greatest_costs > problem.ceilings, problem.totals(choice) - problem.ceilings, 0.0)


def _price_alone(problem: Problem, constraint: int) -> float:
    """The best price of a limit if it were the only one: the slope of the hull where it is met."""
    only = Problem(problem.losses, problem.costs[[constraint]], problem.limits[[constraint]])
    found = descend(only, np.ones(1))
    return found[1] if found else 0.0


def _cutting_planes(problem: Problem, binding: Ints, alone: Floats) -> Floats:
    """The best prices of several limits, shape (constraints,)."""
    worst = np.where(problem.exists, problem.losses, -np.inf).max(1)
    span = float((worst - problem.losses.min(1)).sum()) or 1.0
    unit = np.where(alone > 0, alone, span / problem.greatest_costs[binding])

    def plane(point: Floats) -> tuple[Floats, float, Floats]:
        """Prices, g, and its slopes per unit."""
        prices = np.zeros(len(problem.limits))
        prices[binding] = point * unit
        choice = priced_choice(problem, prices)
        slopes = _excess(problem, choice)[binding] * unit
        return prices, problem.loss(choice) + float(slopes @ point), slopes

    points = [np.zeros(len(binding)), *np.diag(np.sign(alone)), np.sign(alone) / len(binding)]
    seen = [plane(point) for point in points]
    scale = max(value for _, value, _ in seen) - seen[0][1] or span
    for _ in range(_PLANES):
        best = max(range(len(seen)), key=lambda k: seen[k][1])
        # greatest height over the box under all planes, measured from the best seen
        rows = np.array([np.r_[1.0, -slopes / scale] for _, _, slopes in seen])
        heights = np.array([(v - seen[best][1] - s @ p) / scale for p, (_, v, s) in zip(points, seen, strict=True)])
        size = np.abs(rows).max(1)
        found = linprog(
            np.r_[-1.0, np.zeros(len(binding))],
            A_ub=rows / size[:, None],
            b_ub=heights / size,
            bounds=[(None, None), *[(0.0, _BOX)] * len(binding)],
        )
        if found.x is None or -found.fun <= _PRECISION:
            break
        points.append((points[best] + found.x[1:]) / 2)
        seen.append(plane(points[-1]))
    return max(seen, key=lambda one: one[1])[0]
