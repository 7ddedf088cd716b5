"""Kept terms: exact while there are rows, right in the mean beyond, and of the same pass as the losses."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.errors import SpecError
from lq.sensitivity.kept_terms import KeptTerms


def gram(found):
    flat = np.concatenate([part.reshape(-1, part.shape[2]) for part in found]).astype(float)
    return flat @ flat.T


def test_exact_up_to_the_number_of_rows():
    terms = [torch.randn(6, 2, 3), torch.randn(6, 1, 3)]
    kept = KeptTerms()
    kept.add([t[:4] for t in terms])
    kept.add([t[4:] for t in terms])
    flat = torch.cat([t.flatten(1) for t in terms], 1).double()
    assert kept.found(0.5)[0].shape == (2, 3, 6)
    assert gram(kept.found(0.5)) == pytest.approx((flat.T @ flat / 12).numpy(), rel=1e-5, abs=1e-6)


def test_samples_that_do_not_count_are_left_out():
    terms, kept = torch.randn(6, 2, 3), KeptTerms()
    counted = torch.tensor([True, False, True, True, False, True])
    kept.add([terms], counted)
    flat = terms[counted].flatten(1)
    assert gram(kept.found(1.0)) == pytest.approx((flat.T @ flat / 4).numpy(), rel=1e-5, abs=1e-6)


def test_memory_is_bounded_and_the_products_stay_right():
    terms, kept = torch.randn(20_000, 1, 1) + torch.tensor([0.0, 0.0, 0.0]).view(1, 3, 1), KeptTerms(rows=100)
    for batch in terms.split(500):
        kept.add([batch])
    found = kept.found(1.0)
    assert found[0].shape == (3, 1, 100)
    # rows of 200 samples each are nearly normal: a product is off by its size over the square root of 100
    assert gram(found) == pytest.approx(terms.square().mean().item(), rel=0.5)
    few = KeptTerms(values=1)
    few.add([torch.randn(200, 2, 2)])
    assert few.found(1.0)[0].shape == (2, 2, 64)


@pytest.mark.parametrize("metric", ["fisher", "model_fisher", "output_distortion"])
def test_squares_are_the_losses_of_the_same_pass(metric):
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    model = lq.attach(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 4, 4, first_last=None)
    lq.calibrate(model, [x])
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    plain = lq.measure_sensitivity(model, batches, metric, group=2)
    table = lq.measure_sensitivity(model, batches, metric, group=2, cross_terms=True)
    assert plain.terms is None and set(table.terms) == {t.name for t in table.tensors}
    for tensor in table.tensors:
        terms = table.terms[tensor.name].astype(float)
        np.testing.assert_array_equal(tensor.loss, plain[tensor.name].loss)
        np.testing.assert_allclose((terms**2).sum(2), tensor.group_loss, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose((terms.sum(0) ** 2).sum(1), tensor.loss, rtol=1e-4, atol=1e-12)
    assert lq.Sensitivity.from_json(table.to_json()).terms is None


def test_who_has_no_terms_says_so():
    model = lq.attach(nn.Sequential(nn.Linear(4, 3)), 4, first_last=None)
    batches = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
    message = "of BruteForce; measure on one rank by 'fisher', 'model_fisher', 'output_distortion'"
    with pytest.raises(SpecError, match=f"^cross_terms=True is not known {message}"):
        lq.measure_sensitivity(model, batches, "kl", activations=False, cross_terms=True)
    with pytest.raises(SpecError, match="cross_terms=True is not known of several ranks"):
        lq.measure_sensitivity(model, batches, activations=False, cross_terms=True, reduce=lambda x, how: x)
