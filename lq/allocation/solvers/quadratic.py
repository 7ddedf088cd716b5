r"""A knapsack whose losses have cross terms: ``f(x) = sum_i losses[i, x_i] + share * sum_{i != j} v[i, x_i] . v[j, x_j]``.

With the terms ``v[i, a]`` of sensitivity (``g_n . Δ_i(a)`` of each sample over ``sqrt(2 N)``) this is CLADO's quadratic
program (Deng et al., Mixed-Precision Quantization with Cross-Layer Dependencies, equation 5) with the Gauss-Newton
matrix, which is positive semi-definite. Terms of few samples make chance look like dependence, which a minimum over
many choices seeks out: off-diagonal entries are multiplied by ``share``, of which Schäfer and Strimmer (2005) say how
large it should be (`share_of`).

From the additive choice, items choose in turn at a price of the cost (coordinate descent); the price is halved and
doubled until the limit is nearly met; then exchanges of two items and upgrades that fit, until none helps.

The bound: ``|u|^2 >= 2 u . u0 - |u0|^2`` for every ``u0``, so that for the sum ``u`` of the chosen terms ::

    f(x) >= sum_i (losses[i, x_i] - share * |v[i, x_i]|^2 + 2 share * v[i, x_i] . u0) - share * |u0|^2

which is additive in the items, and bounded as such (`lq.allocation.solvers.dual`). The best of some ``u0`` counts; with
``u0 = 0`` it is ``1 - share`` of the additive bound. The additive bound itself is no floor: cross terms may be negative.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lq.allocation.solvers.dual import dual_bound, dual_prices
from lq.allocation.solvers.problem import Floats, Ints, Problem, Solution
from lq.errors import SpecError

_SWEEPS = 4
_HALVINGS = 14
_SPAN = 64.0  # prices are searched within this factor of the additive one
_EXCHANGES = 400
_TANGENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A problem and the cross terms of its options.

    Args:
        problem: losses of single options, costs and limits.
        terms: of each option, shape (items, options, samples).
        share: of the products of two items' terms that counts, 0 (additive) to 1.

    Raises:
        SpecError: for shapes that do not fit, terms that are not finite, or another share.
    """

    problem: Problem
    terms: Floats
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.terms.ndim != 3 or self.terms.shape[:2] != self.problem.losses.shape:
            raise SpecError(
                f"terms of shape {self.terms.shape} do not fit losses of shape {self.problem.losses.shape}; use "
                "(items, options, samples)"
            )
        if not np.isfinite(self.terms).all():
            raise SpecError("terms have NaN or Inf; use 0 for options that do not exist")
        if not 0 <= self.share <= 1:
            raise SpecError(f"share={self.share}; use a number from 0 (additive) to 1 (all of the cross terms)")

    def loss(self, choice: Ints) -> float:
        """The loss of a choice, cross terms included.

        >>> problem = Problem(losses=[[1.0], [1.0]], costs=np.ones((1, 2, 1)), limits=[2])
        >>> Quadratic(problem, np.array([[[1.0]], [[-1.0]]])).loss(np.array([0, 0]))
        0.0
        """
        chosen = self._chosen(choice)
        total = chosen.sum(0)
        return self.problem.loss(choice) + self.share * float(total @ total - (chosen**2).sum())

    def marginal(self, choice: Ints) -> Floats:
        """What each option adds to the loss while all other items stay, shape (items, options)."""
        chosen = self._chosen(choice)
        total = chosen.sum(0)
        own = np.matmul(self.terms, chosen.astype(self.terms.dtype)[:, :, None])[:, :, 0]
        cross = self.terms @ total.astype(self.terms.dtype) - own
        found: Floats = self.problem.losses + 2 * self.share * cross
        return found

    def bound(self, choice: Ints) -> float:
        """No choice within the limits loses less, by tangents at shares of this choice's sum of terms."""
        total = self._chosen(choice).sum(0)
        square = float(total @ total)
        rest = self.problem.losses - self.share * np.where(self.problem.exists, (self.terms**2).sum(2), 0.0)
        slope = 2 * self.share * (self.terms @ total)
        found = []
        for part in _TANGENTS:
            tangent = Problem(rest + part * slope, self.problem.costs, self.problem.limits, self.problem.names)
            found.append(dual_bound(tangent, dual_prices(tangent)) - self.share * part**2 * square)
        return max(found)

    def _chosen(self, choice: Ints) -> Floats:
        chosen: Floats = self.terms[np.arange(len(choice)), choice].astype(np.float64)
        return chosen


def share_of(terms: Floats) -> float:
    """The share of the cross terms of a choice that is no chance, from 0 to 1.

    ``1 - sum Var(s_ij) / sum s_ij^2`` over pairs of items with ``s_ij = mean_n t[i, n] t[j, n]``: the shrinkage towards
    the diagonal of Schäfer and Strimmer (Statistical Applications in Genetics and Molecular Biology 4, 2005).

    Args:
        terms: of the items at a choice, (items, samples).

    >>> share_of(np.ones((3, 8)))
    1.0
    """
    items, samples = terms.shape
    if items < 2 or samples < 2:
        return 0.0
    small = terms.T @ terms if samples <= items else terms @ terms.T  # the same sum of squares
    squares = terms**2
    off = (float((small**2).sum()) / samples - float((squares.sum(1) ** 2).sum()) / samples) / samples
    second = float((squares.sum(0) ** 2).mean() - (squares**2).mean(1).sum())
    if off <= 0:
        return 0.0
    return float(np.clip(1 - (second - off) / ((samples - 1) * off), 0.0, 1.0))


def minimize(quadratic: Quadratic, start: Ints) -> Solution:
    """A choice within the limits that loses little, no more than `start`, which is within them.

    >>> problem = Problem(losses=[[4, 1], [4, 1], [4, 0]], costs=[[[1, 2]] * 3], limits=[5])
    >>> terms = np.array([[[2.0], [1.0]], [[-2.0], [-1.0]], [[0.0], [0.0]]])
    >>> minimize(Quadratic(problem, terms), np.array([1, 1, 0])).choice
    array([0, 0, 1])
    """
    problem = quadratic.problem
    prices = dual_prices(problem)
    candidates = [start, *_priced(quadratic, start, prices)] if prices.any() else [start]
    best = min((_filled(quadratic, choice) for choice in candidates[-1:] + [start]), key=quadratic.loss)
    loss = quadratic.loss(best)
    return Solution(best, loss, problem.totals(best), min(quadratic.bound(best), loss))


def _priced(quadratic: Quadratic, start: Ints, prices: Floats) -> Iterator[Ints]:
    """Choices within the limits by coordinate descent at factors of the prices, each better than the last."""
    low, high, choice = 1 / _SPAN, _SPAN, start
    least = quadratic.loss(start)
    for _ in range(_HALVINGS):
        factor = (low * high) ** 0.5
        choice = _descend(quadratic, choice, factor * np.tensordot(prices, quadratic.problem.costs, 1))
        if not quadratic.problem.meets(choice):
            low = factor
            continue
        high = factor
        if (loss := quadratic.loss(choice)) < least:
            least = loss
            yield choice


def _descend(quadratic: Quadratic, choice: Ints, paid: Floats) -> Ints:
    """Each item in turn takes the option that is best while the others stay."""
    terms, losses = quadratic.terms, quadratic.problem.losses + paid
    choice, total = choice.copy(), quadratic._chosen(choice).sum(0)
    for _ in range(_SWEEPS):
        before = choice.copy()
        for i, now in enumerate(before):
            rest = total - terms[i, now]
            values = losses[i] + 2 * quadratic.share * (terms[i] @ rest)
            best = int(values.argmin())
            if values[best] < values[now]:
                choice[i], total = best, rest + terms[i, best]
        if (choice == before).all():
            break
    return choice


def _filled(quadratic: Quadratic, choice: Ints) -> Ints:
    """Upgrades that fit and exchanges of two items, the best first, until none helps."""
    problem, terms = quadratic.problem, quadratic.terms
    rows = np.arange(len(choice))
    choice = choice.copy()
    for _ in range(_EXCHANGES):
        marginal = quadratic.marginal(choice)
        change = marginal - marginal[rows, choice][:, None]
        extra = problem.costs - problem.costs[:, rows, choice][:, :, None]
        left = problem.ceilings - problem.totals(choice)
        fits = problem.exists & (extra <= left[:, None, None]).all(0)
        moved = choice.copy()
        single = int(np.where(fits, change, np.inf).argmin())
        one, option = divmod(single, change.shape[1])
        gain = change[one, option]
        moved[one] = option
        # exchanges with the item that moves best per cost if it is paid for by another
        for i, a in _promising(change, extra, problem):
            step = terms[i, a].astype(np.float64) - terms[i, choice[i]]
            both = change + change[i, a] + 2 * quadratic.share * (
                (terms @ step) - (terms[rows, choice] @ step)[:, None]
            )
            allowed = problem.exists & (extra + extra[:, i, a][:, None, None] <= left[:, None, None]).all(0)
            allowed[i] = False
            allowed[rows, choice] = False
            other, b = divmod(int(np.where(allowed, both, np.inf).argmin()), both.shape[1])
            if allowed[other, b] and both[other, b] < gain:
                gain, moved = both[other, b], choice.copy()
                moved[i], moved[other] = a, b
        if not gain < -1e-12 * abs(quadratic.loss(choice)) or not problem.meets(moved):
            return choice
        choice = moved
    return choice


def _promising(change: Floats, extra: Floats, problem: Problem, most: int = 64) -> list[tuple[int, int]]:
    """Moves of an item that lose least, the first of which an exchange may consist."""
    values = np.where(problem.exists & (extra != 0).any(0), change, np.inf)
    order = values.ravel().argsort(kind="stable")[:most]
    return [divmod(int(k), change.shape[1]) for k in order if np.isfinite(values.ravel()[k])]
