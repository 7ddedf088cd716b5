r"""A knapsack with cross terms: ``f(x) = sum_i losses[i, x_i] + share * sum_{i != j} v[i, x_i] . v[j, x_j]``.

With the terms ``v[i, a]`` of sensitivity (``g_n . Δ_i(a)`` of each sample over ``sqrt(2 N)``) this is CLADO's quadratic
program (Deng et al., Mixed-Precision Quantization with Cross-Layer Dependencies, equation 5) with the Gauss-Newton
matrix, which is positive semi-definite. Terms of few samples make chance look like dependence, which a minimum over
many choices seeks out: off-diagonal entries are multiplied by ``share``, of which Schäfer and Strimmer (2005) say how
large it should be (`share_of`).

From the additive choice, items choose in turn at a price of the costs (coordinate descent); factors of the price are
bisected until the limits are nearly met; then come upgrades that fit and, of few items, exchanges of two.

The bound: ``|u|^2 >= 2 u . u0 - |u0|^2`` for every ``u0``, so that for the sum ``u`` of the chosen terms ::

    f(x) >= sum_i (losses[i, x_i] - share * |v[i, x_i]|^2 + 2 share * v[i, x_i] . u0) - share * |u0|^2

which is additive in the items, and bounded as such (`lq.allocation.solvers.dual`). The best of some ``u0`` counts; with
``u0 = 0`` it is ``1 - share`` of the additive bound. The additive bound itself is no floor: cross terms may be
negative.
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
_ROUNDS = 100
_PAIRS = 1 << 22  # of options, up to which all exchanges are tried
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
        rest = self.problem.losses - self.share * np.einsum("iwn,iwn->iw", self.terms, self.terms)
        slope = 2 * self.share * (self.terms @ total.astype(self.terms.dtype))
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
    found = [start, *_priced(quadratic, start, prices)]
    found = [_upgraded(quadratic, choice) for choice in (found[0], *found[1:][-2:])]
    best = min((_exchanged(quadratic, choice) for choice in found), key=quadratic.loss)
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


def _upgraded(quadratic: Quadratic, choice: Ints) -> Ints:
    """Take options that fit and lose less, as many at a time as lose less together."""
    problem, rows = quadratic.problem, np.arange(len(choice))
    price = dual_prices(problem)
    loss = quadratic.loss(choice)
    for _ in range(_ROUNDS):
        marginal = quadratic.marginal(choice)
        gain = marginal[rows, choice][:, None] - marginal
        extra = problem.costs - problem.costs[:, rows, choice][:, :, None]
        left = problem.ceilings - problem.totals(choice)
        fits = problem.exists & (gain > 0) & (extra <= left[:, None, None]).all(0)
        paid = np.tensordot(price, extra, 1)
        least = 1e-9 * paid.max() if paid.max() > 0 else 1.0  # of upgrades that are free, the most gain
        rate = np.where(fits, gain, 0.0) / np.maximum(paid, least)
        option = rate.argmax(1)
        items = np.flatnonzero(fits.any(1))
        items = items[(-rate[items, option[items]]).argsort(kind="stable")]
        count = len(items)
        while count:
            moved = choice.copy()
            moved[items[:count]] = option[items[:count]]
            if problem.meets(moved) and quadratic.loss(moved) < loss * (1 - 1e-12):
                break
            count //= 2
        if not count:
            break
        choice, loss = moved, quadratic.loss(moved)
    return choice


def _exchanged(quadratic: Quadratic, choice: Ints) -> Ints:
    """The best move of one item, or of two together, until none helps; of choices that are not large."""
    problem, terms = quadratic.problem, quadratic.terms
    items, options = problem.losses.shape
    if (items * options) ** 2 > _PAIRS:
        return choice
    flat = terms.reshape(items * options, -1).astype(np.float64)
    products = 2 * quadratic.share * (flat @ flat.T)
    owner, costs = np.repeat(np.arange(items), options), problem.costs.reshape(len(problem.costs), -1)
    apart = owner[:, None] != owner
    while True:
        now = np.arange(items) * options + choice
        from_now = now[owner]
        marginal = quadratic.marginal(choice)
        change = (marginal - marginal[np.arange(items), choice][:, None]).ravel()
        change = np.where(problem.exists.ravel(), change, np.inf)
        extra, left = costs - costs[:, from_now], problem.ceilings - problem.totals(choice)
        both = change[:, None] + change + products - products[:, from_now] - products[from_now]
        both += products[np.ix_(from_now, from_now)]
        fits = apart.copy()
        for spent, room in zip(extra, left, strict=True):
            fits &= spent[:, None] + spent <= room
        # an item that stays makes a move of one
        one, other = divmod(int(np.where(fits, both, np.inf).argmin()), len(change))
        moved = choice.copy()
        for option in (one, other):
            moved[owner[option]] = option % options
        loss = quadratic.loss(choice)
        if not fits[one, other] or not problem.meets(moved) or not quadratic.loss(moved) < loss - 1e-12 * abs(loss):
            return choice
        choice = moved
