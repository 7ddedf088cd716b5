"""Cross terms in `lq.allocate`: the loss it reports is that of the measured terms, and the budget holds."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.allocation.solvers.quadratic import share_of
from lq.errors import DataError, SpecError


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4))
    lq.attach(model, 4, 8, first_last=None)
    batches = [(torch.randn(256, 16), torch.randint(4, (256,)))]
    lq.calibrate(model, batches)
    return model, lq.measure_sensitivity(model, batches, "model_fisher", cross_terms=True)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("activations", [None, 4.0])
def test_it_is_within_the_budget_and_another_choice(measured, granularity, activations):
    model, table = measured
    additive, found = (
        lq.allocate(model, table, 3.0, granularity=granularity, activations=activations, cross_terms=cross)
        for cross in (False, True)
    )
    bits = sum(
        np.sum(np.broadcast_to(b, (n,))) * k
        for b, n, k in zip(found.weights.values(), (24, 12, 4), (16, 24, 12), strict=True)
    )
    assert bits <= 3.0 * (16 * 24 + 24 * 12 + 12 * 4) + 1e-9
    assert found.bound <= found.loss
    assert found != additive
    assert lq.Allocation.from_json(found.to_json()) == found


def test_what_is_missing_is_said(measured):
    model, table = measured
    read = lq.Sensitivity.from_json(table.to_json())
    with pytest.raises(DataError, match=r"no cross terms: measure it by measure_sensitivity\(..., cross_terms=True\)"):
        lq.allocate(model, read, 3.0, cross_terms=True)
    with pytest.raises(SpecError, match="cross_terms=True does not go with a budget of bit operations"):
        lq.allocate(model, table, "20kBitOps", activations=4.0, cross_terms=True)


def test_the_loss_is_that_of_the_terms(measured):
    model, table = measured
    additive, found = (lq.allocate(model, table, 3.0, cross_terms=cross) for cross in (False, True))

    def vectors(allocation):
        at = [(f"{name}.weight", table.widths.index(bits)) for name, bits in allocation.weights.items()]
        return np.stack([table.terms[name].sum(0)[width] for name, width in at]).astype(float)

    share = 0.5 * share_of(vectors(additive))
    chosen = vectors(found)
    squares = (chosen**2).sum()
    assert share > 0.1
    assert found.loss == pytest.approx((1 - share) * squares + share * (chosen.sum(0) ** 2).sum(), rel=1e-4)
