import itertools

import numpy as np
import pytest

from lq.allocation.solvers import Exact, Problem
from lq.allocation.solvers.products import Pair, merge
from lq.errors import SpecError

VALUES = np.array([1.0, 2.0, 4.0])


def made(items, seed=0):
    rng = np.random.default_rng(seed)
    losses = rng.lognormal(0, 1, (items, 1)) * np.array([1.0, 0.3, 0.05])
    return losses, rng.uniform(0, 2, (2, items, 1)) * VALUES, rng


def total(costs, pairs, constraint, choice):
    found = costs[:, np.arange(len(choice)), choice].sum(1)
    for pair in pairs:
        found[constraint] += pair.factor * VALUES[choice[pair.one]] * VALUES[choice[pair.other]]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_option_costs_and_loses_what_its_choices_do(seed):
    losses, costs, rng = made(6, seed)
    losses[2, 0] = np.inf
    pairs = [Pair(0, 2, rng.uniform()), Pair(0, 3, rng.uniform()), Pair(1, 4, rng.uniform()), Pair(0, 1, rng.uniform())]
    merged = merge(losses, costs, pairs, 1, VALUES, {0, 1})
    assert sorted(item for group in merged.groups for item in group) == list(range(6))
    for option in range(merged.losses.shape[1]):
        options = np.array([min(option, len(choices) - 1) for choices in merged.choices])
        choice = merged.unmerged(options)
        rows = np.arange(len(options))
        assert merged.losses[rows, options].sum() == pytest.approx(losses[np.arange(6), choice].sum())
        np.testing.assert_allclose(merged.costs[:, rows, options].sum(1), total(costs, pairs, 1, choice))


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_is_near_that_of_all_choices(seed):
    losses, costs, rng = made(4, seed)
    pairs = [Pair(2, 0, rng.uniform(0.5, 2)), Pair(3, 1, rng.uniform(0.5, 2))]
    all_choices = [np.array(choice) for choice in itertools.product(range(3), repeat=4)]
    limits = np.quantile([total(costs, pairs, 0, choice) for choice in all_choices], 0.5, axis=0)
    merged = merge(losses, costs, pairs, 0, VALUES, {0, 1})
    found = merged.unmerged(Exact()(Problem(merged.losses, merged.costs, limits)).choice)
    assert (total(costs, pairs, 0, found) <= limits * (1 + 1e-9)).all()
    best = min(
        losses[np.arange(4), choice].sum()
        for choice in all_choices
        if (total(costs, pairs, 0, choice) <= limits * (1 + 1e-9)).all()
    )
    assert losses[np.arange(4), found].sum() <= 1.05 * best


def test_items_without_pairs_stay_apart():
    losses, costs, _ = made(3)
    losses[1, 1] = np.inf
    merged = merge(losses, costs, [], 0, VALUES, {0})
    assert merged.groups == ((0,), (1,), (2,))
    assert merged.unmerged(np.array([2, 1, 0])).tolist() == [2, 2, 0]
    assert np.isinf(merged.losses[1, 2])


def test_long_walks_are_thinned_and_keep_their_ends():
    losses, costs, _ = made(201)
    merged = merge(losses, costs * 0, [Pair(0, i, 1.0) for i in range(1, 201)], 0, VALUES, {0})
    assert merged.losses.shape == (1, 3 * 64)
    assert merged.losses.min() == pytest.approx(losses[:, 2].sum())
    assert merged.losses.max() == pytest.approx(losses[:, 0].sum())


def test_too_many_linked_activations():
    losses, costs, _ = made(5)
    with pytest.raises(SpecError, match="4 activations are linked by products"):
        merge(losses, costs, [Pair(i, 4, 1.0) for i in range(4)], 0, VALUES, {0, 1, 2, 3})
