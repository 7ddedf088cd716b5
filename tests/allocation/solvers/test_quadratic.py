"""Cross terms against brute force: all choices of tiny problems, and a quadratic loss whose cross terms are known."""

import itertools

import numpy as np
import pytest

from lq.allocation.solvers import Lagrangian, Problem
from lq.allocation.solvers.dual import dual_bound, dual_prices
from lq.allocation.solvers.quadratic import Quadratic, minimize, share_of
from lq.errors import SpecError

SHARES = (0.0, 0.3, 1.0)


def tiny(seed, share, items=5, options=3, samples=4):
    """A problem whose terms at the options of an item resemble each other, as rounding errors do."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=(items, 1, 1))) * np.array([2.0, 1.0, 0.5])[:, None]
    terms = size * (rng.normal(size=(items, 1, samples)) + 0.5 * rng.normal(size=(items, options, samples)))
    costs = rng.integers(1, 9, size=(1, items, 1)) * np.arange(1.0, options + 1)
    limit = 1.8 * costs.min(2).sum()
    return Quadratic(Problem((terms**2).sum(2), costs, [limit]), terms, share)


def choices(quadratic):
    items, options = quadratic.problem.losses.shape
    every = (np.array(x) for x in itertools.product(range(options), repeat=items))
    return [x for x in every if quadratic.problem.meets(x)]


@pytest.mark.parametrize("share", SHARES)
def test_near_the_best_of_all_choices_and_never_below_the_bound(share):
    optimal = 0
    for seed in range(20):
        quadratic = tiny(seed, share)
        best = min(quadratic.loss(x) for x in choices(quadratic))
        start = Lagrangian()(quadratic.problem).choice
        found = minimize(quadratic, start)
        assert quadratic.problem.meets(found.choice)
        assert found.loss == pytest.approx(quadratic.loss(found.choice))
        assert best - 1e-9 <= found.loss <= quadratic.loss(start) + 1e-12
        assert found.bound <= best + 1e-9
        prices = dual_prices(quadratic.problem)
        assert found.bound >= (1 - share) * dual_bound(quadratic.problem, prices) - 1e-9
        optimal += found.loss <= best * (1 + 1e-9)
    assert optimal >= 17


def test_the_additive_bound_is_no_floor():
    """Two errors that cancel lose less than any of them alone."""
    problem = Problem([[1.0], [1.0]], np.ones((1, 2, 1)), [2])
    quadratic = Quadratic(problem, np.array([[[1.0]], [[-1.0]]]))
    found = minimize(quadratic, np.array([0, 0]))
    assert found.loss == 0 and found.bound <= 0 < Lagrangian()(problem).bound


def test_loss_is_that_of_a_quadratic_network_loss():
    """Pairs give ``L(Δi + Δj) - L(Δi) - L(Δj) + L(0)`` of ``L(W) = |J W|^2 / 2N``, each twice over two."""
    rng = np.random.default_rng(0)
    jacobian, changes = rng.normal(size=(7, 3, 4)), rng.normal(size=(3, 2, 4))  # samples, items; options

    def loss(which):
        moved = sum((jacobian[:, i] @ changes[i, a] for i, a in which), np.zeros(7))
        return float(moved @ moved) / 14

    terms = np.einsum("nik,iak->ian", jacobian, changes) / np.sqrt(14)
    quadratic = Quadratic(Problem((terms**2).sum(2), np.ones((1, 3, 2)), [3]), terms)
    for x in choices(quadratic):
        cross = sum(
            loss([(i, x[i]), (j, x[j])]) - loss([(i, x[i])]) - loss([(j, x[j])])
            for i, j in itertools.combinations(range(3), 2)
        )
        alone = sum(loss([(i, x[i])]) for i in range(3))
        assert quadratic.loss(x) == pytest.approx(alone + cross) == pytest.approx(loss(list(enumerate(x))))


@pytest.mark.parametrize("share", SHARES)
def test_marginal_is_the_change_by_one_item(share):
    quadratic = tiny(3, share)
    x = np.array([2, 0, 1, 1, 2])
    marginal = quadratic.marginal(x)
    for i, a in itertools.product(range(5), range(3)):
        y = x.copy()
        y[i] = a
        assert marginal[i, a] - marginal[i, x[i]] == pytest.approx(quadratic.loss(y) - quadratic.loss(x))


def test_options_that_do_not_exist_are_not_taken():
    losses = np.array([[1.0, np.inf], [1.0, 1.0]])
    terms = np.array([[[1.0], [0.0]], [[1.0], [-1.0]]])
    found = minimize(Quadratic(Problem(losses, np.ones((1, 2, 2)), [2]), terms), np.array([0, 0]))
    assert found.choice.tolist() == [0, 1] and found.loss == 0


def test_share_of_chance_is_small_and_of_dependence_is_large():
    rng = np.random.default_rng(0)
    assert share_of(rng.normal(size=(30, 200))) < 0.2
    assert share_of(rng.normal(size=200) + 0.3 * rng.normal(size=(30, 200))) > 0.9
    assert share_of(np.ones((1, 9))) == share_of(np.ones((9, 1))) == share_of(np.zeros((4, 4))) == 0


@pytest.mark.parametrize("shape", [(4, 30), (30, 4)])
def test_share_is_that_of_the_sums_over_pairs(shape):
    terms = np.random.default_rng(1).normal(size=shape) + 1
    pairs = list(itertools.permutations(range(shape[0]), 2))
    products = np.array([terms[i] * terms[j] for i, j in pairs])
    variance = products.var(1, ddof=1).sum() / shape[1]
    expected = 1 - variance / (products.mean(1) ** 2).sum()
    assert share_of(terms) == pytest.approx(np.clip(expected, 0, 1))


@pytest.mark.parametrize(
    ("terms", "share", "message"),
    [
        (
            np.zeros((2, 1)),
            1.0,
            r"terms of shape \(2, 1\) do not fit losses of shape \(2, 1\); use \(items, options, s",
        ),
        (np.full((2, 1, 3), np.nan), 1.0, "terms have NaN or Inf; use 0"),
        (np.zeros((2, 1, 3)), 1.5, "share=1.5; use a number from 0"),
    ],
)
def test_errors(terms, share, message):
    with pytest.raises(SpecError, match=message):
        Quadratic(Problem([[1.0], [1.0]], np.ones((1, 2, 1)), [2]), terms, share)
