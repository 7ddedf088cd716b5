import numpy as np
import pytest

from lq.allocation.budget import Budget, Costs, Product, TensorCost, parse_budget
from lq.allocation.counting import Choice, Counting, Limit
from lq.errors import BudgetError, DataError, SpecError
from lq.sensitivity import TensorSensitivity

WIDTHS = np.array([2.0, 4.0, 8.0])


def item(name, role, numel, channels=None, share=1.0):
    loss = np.array([4.0, 2.0, 1.0])
    return Choice(TensorSensitivity(name, role, numel, 2, loss, loss, loss[None], loss[None]), channels, share, loss)


ITEMS = [
    item("a.weight", "weight", 100, slice(0, 1), 0.5),
    item("a.weight", "weight", 100, slice(1, 2), 0.5),
    item("b.weight", "weight", 300),
    item("b.input", "activation", 50),
]
COSTS = Costs(
    {
        "a.weight": TensorCost("a.weight", "a", "weight", 100, 8.0),
        "b.weight": TensorCost("b.weight", "b", "weight", 300, 8.0),
        "b.input": TensorCost("b.input", "b", "activation", 0, 6.0),
        "c.weight": TensorCost("c.weight", "c", "weight", 80, 3.0),
    },
    (Product("a", 1000.0, None, "a.weight"), Product("b", 500.0, "b.input", "b.weight"), Product("c", 7.0, None, None)),
    overhead=11.0,
)


def test_mean_bits():
    weights = Counting(ITEMS, COSTS, WIDTHS, joint=False).table(parse_budget(3.0))
    np.testing.assert_allclose(weights, np.array([50, 50, 300, 0])[:, None] * WIDTHS / 400)
    joint = Counting(ITEMS, COSTS, WIDTHS, joint=True).table(parse_budget(3.0))
    np.testing.assert_allclose(joint, np.array([50, 50, 300, 50])[:, None] * WIDTHS / 450)
    activations = Counting(ITEMS, COSTS, WIDTHS, joint=False).mean_bits("activation")
    np.testing.assert_allclose(activations, np.array([0, 0, 0, 1])[:, None] * WIDTHS)


def test_a_kind_of_budget_that_costs_nothing_is_refused():
    with pytest.raises(SpecError, match="nothing is known of the costs of a budget of nothing"):
        Counting(ITEMS, COSTS, WIDTHS, joint=False).table(Budget("nothing", 1.0))


def test_bytes():
    count = Counting(ITEMS, COSTS, WIDTHS, joint=False)
    np.testing.assert_allclose(count.table(parse_budget("1kB")), np.array([50, 50, 300, 0])[:, None] * WIDTHS / 8)
    # what stays, the weight that is not allocated, a byte to round each layer up, half a byte for each channel's width
    assert count.fixed(parse_budget("1kB")) == 11 + 80 * 3 / 8 + 2 + 1


def test_bit_operations():
    count = Counting(ITEMS, COSTS, WIDTHS, joint=True)
    budget = parse_budget("1MBitOps")
    np.testing.assert_allclose(count.table(budget), np.array([16000, 16000, 0, 0])[:, None] * WIDTHS)
    assert [(pair.one, pair.other, pair.factor) for pair in count.pairs(budget)] == [(3, 2, 500.0)]
    assert count.fixed(budget) == 7 * 32 * 32
    fixed = Counting(ITEMS[:3], COSTS, WIDTHS, joint=False)
    np.testing.assert_allclose(fixed.table(budget), np.array([16000, 16000, 3000])[:, None] * WIDTHS)
    assert fixed.pairs(budget) == ()


def test_operations_that_were_not_counted():
    silent = Costs(COSTS.tensors, (Product("a", 0.0, None, "a.weight"),), 0.0)
    with pytest.raises(DataError, match="no operations were counted; run lq.calibrate"):
        Counting(ITEMS[:3], silent, WIDTHS, joint=False).table(parse_budget("1MBitOps"))


def test_limits_know_what_is_fixed():
    limit = Limit(Budget("bytes", 100.0), np.zeros((1, 3)), fixed=60.0)
    assert limit.left == 40
    assert limit.show(10.0) == "70 bytes"
    limit.check(40.0, 200.0)
    with pytest.raises(
        BudgetError, match="the budget of 100 bytes cannot be met: .* feasible are 101 bytes to 260 bytes"
    ):
        limit.check(41.0, 200.0)
