"""Costs that are products of two choices, as bit operations of weights and activations that are both allocated.

A knapsack adds up costs of single choices. Items that multiply each other are therefore merged into one item whose
options are choices for all of them: every combination of those that are enumerated (activations: few) with the points
of the lower convex hull of the rest (weights, each of which multiplies enumerated ones only). The hull is walked from
the least cost up, the step first that gains most per unit, as `lq.allocation.solvers.greedy` walks it down; what lies
between its points is lost, which is less than one step of one weight. Long walks are thinned evenly.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lq.allocation.solvers.problem import Floats, Ints
from lq.errors import SpecError

_POINTS = 64
_ENUMERATED = 3


@dataclass(frozen=True)
class Pair:
    """Two items whose choices multiply; the cost is ``factor * values[choice of one] * values[choice of other]``."""

    one: int
    other: int
    factor: float


@dataclass(frozen=True, eq=False)
class Merged:
    """Items after merging.

    Args:
        losses: shape (merged items, options), ``inf`` where there is no option.
        costs: shape (constraints, merged items, options).
        groups: the items that each merged item stands for.
        choices: for each merged item, the choice of each of its items by option, (options, items of the group).
    """

    losses: Floats
    costs: Floats
    groups: tuple[tuple[int, ...], ...]
    choices: tuple[Ints, ...]

    def unmerged(self, choice: Ints) -> Ints:
        """The choice of each original item."""
        found = np.zeros(sum(map(len, self.groups)), dtype=np.int64)
        for option, group, choices in zip(choice, self.groups, self.choices, strict=True):
            found[list(group)] = choices[option]
        return found


def merge(
    losses: Floats, costs: Floats, pairs: Sequence[Pair], constraint: int, values: Floats, enumerated: Collection[int]
) -> Merged:
    """Merge the items that multiply each other.

    Args:
        losses: shape (items, options), ``inf`` where there is no option.
        costs: shape (constraints, items, options): what single choices cost.
        pairs: what products of choices cost besides, in one of the constraints.
        constraint: that constraint.
        values: value of each option in a product, shape (options,).
        enumerated: the items whose combinations are all tried; each pair has one of them.

    >>> losses, costs = np.array([[4.0, 1.0], [2.0, 0.0]]), np.zeros((1, 2, 2))
    >>> found = merge(losses, costs, [Pair(0, 1, 1.0)], 0, np.array([1.0, 2.0]), {0})
    >>> found.losses, found.costs[0]
    (array([[6., 4., 3., 1.]]), array([[1., 2., 2., 4.]]))
    """
    groups = _groups(len(losses), pairs)
    made = []
    for group in groups:
        mine = [pair for pair in pairs if pair.one in group]
        choices = _choices(group, losses, costs[constraint], mine, values, enumerated)
        loss = sum(losses[item, choices[:, k]] for k, item in enumerate(group))
        cost = sum(costs[:, item, choices[:, k]] for k, item in enumerate(group)) + np.zeros((len(costs), len(choices)))
        at = {item: k for k, item in enumerate(group)}
        for pair in mine:
            one, other = (values[choices[:, at[item]]] for item in (pair.one, pair.other))
            cost[constraint] += pair.factor * one * other
        made.append((loss, cost, choices))
    most = max(len(choices) for _, _, choices in made)
    merged_losses = np.full((len(made), most), np.inf)
    merged_costs = np.zeros((len(costs), len(made), most))
    for row, (loss, cost, choices) in enumerate(made):
        merged_losses[row, : len(choices)] = loss
        merged_costs[:, row, : len(choices)] = cost
    return Merged(merged_losses, merged_costs, tuple(groups), tuple(choices for _, _, choices in made))


def _groups(items: int, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    """Items that are linked by pairs, directly or through others."""
    leader = list(range(items))

    def find(item: int) -> int:
        while leader[item] != item:
            item = leader[item]
        return item

    for pair in pairs:
        leader[find(pair.other)] = find(pair.one)
    grouped: dict[int, list[int]] = {}
    for item in range(items):
        grouped.setdefault(find(item), []).append(item)
    return [tuple(group) for group in grouped.values()]


def _choices(
    group: tuple[int, ...],
    losses: Floats,
    costs: Floats,
    pairs: Sequence[Pair],
    values: Floats,
    enumerated: Collection[int],
) -> Ints:
    """Choices of the items of a group that are worth having, (options, items of the group)."""
    fixed = [item for item in group if item in enumerated] if len(group) > 1 else []
    if len(fixed) > _ENUMERATED:
        raise SpecError(
            f"{len(fixed)} activations are linked by products with each other or with weights that layers share; at "
            f"most {_ENUMERATED} can be allocated together: give activations a mean width, or keep their widths"
        )
    walked = [item for item in group if item not in fixed]
    found = []
    for combination in itertools.product(*(np.flatnonzero(losses[item] < np.inf) for item in fixed)):
        chosen = dict(zip(fixed, combination, strict=True))
        factors = dict.fromkeys(walked, 0.0)
        for pair in pairs:
            for one, other in ((pair.one, pair.other), (pair.other, pair.one)):
                if one in factors and other in chosen:
                    factors[one] += pair.factor * float(values[chosen[other]])
        if len(group) == 1:
            return np.flatnonzero(losses[group[0]] < np.inf)[:, None]
        for path in _walk(walked, losses, costs, factors, values):
            found.append([chosen[item] if item in chosen else path[item] for item in group])
    return np.array(found, dtype=np.int64)


def _walk(
    items: Sequence[int], losses: Floats, costs: Floats, factors: dict[int, float], values: Floats
) -> list[dict[int, int]]:
    """Choices on the lower hull of all items together, from the least cost up."""
    current: dict[int, int] = {}
    steps: list[tuple[float, int, int]] = []
    for item in items:
        hull = _hull(costs[item] + factors[item] * values, losses[item])
        current[item] = hull[0][1]
        steps += [(slope, item, option) for slope, option in hull[1:]]
    path = [dict(current)]
    for _, item, option in sorted(steps, key=lambda step: step[0]):  # most gain per unit first; an item's are in order
        current[item] = option
        path.append(dict(current))
    if len(path) > _POINTS:
        path = [path[k] for k in np.linspace(0, len(path) - 1, _POINTS).round().astype(int)]
    return path


def _hull(costs: Floats, losses: Floats) -> list[tuple[float, int]]:
    """Options on the lower convex hull by rising cost, with the slope that leads to each."""
    options = sorted(np.flatnonzero(losses < np.inf).tolist(), key=lambda o: (costs[o], losses[o]))
    hull: list[int] = []
    for option in options:
        if hull and losses[option] >= losses[hull[-1]]:
            continue  # costs more and loses no less
        while len(hull) > 1 and _slope(costs, losses, hull[-2], option) <= _slope(costs, losses, hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return [(-np.inf, hull[0]), *((_slope(costs, losses, a, b), b) for a, b in itertools.pairwise(hull))]


def _slope(costs: Floats, losses: Floats, start: int, end: int) -> float:
    """Loss per unit of cost between two options."""
    unit = costs[end] - costs[start]
    return float((losses[end] - losses[start]) / unit) if unit else -np.inf
