"""Re-estimating BatchNorm statistics, against means over batches."""

import pytest
import torch
from torch import nn

from lq.calibration.batchnorm import batchnorms, reestimate_batchnorm
from lq.errors import DataError
from tests.quantizer.test_histogram import Ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.5), nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)
    )


def batches_of(count):
    return list(torch.randn(count, 8, 3, generator=torch.Generator().manual_seed(1)) * 3 + 2)


def test_norms_with_statistics():
    model = network()
    assert batchnorms(model) == [model[0]]


def test_statistics_are_the_means_over_batches():
    model, batches = network(), batches_of(5)
    reestimate_batchnorm(model, batches)
    torch.testing.assert_close(model[0].running_mean, torch.stack(batches).mean((0, 1)))
    torch.testing.assert_close(model[0].running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))


def test_what_was_before_does_not_matter():
    model, batches = network(), batches_of(4)
    model[0].running_mean.fill_(99)
    model[0].num_batches_tracked.fill_(1000)
    reestimate_batchnorm(model, ({"x": batch} for batch in batches), forward=lambda m, batch: m(batch["x"]))
    torch.testing.assert_close(model[0].running_mean, torch.stack(batches).mean((0, 1)))


@pytest.mark.parametrize("training", [True, False])
def test_modes_momentum_and_weights_are_restored(training):
    model = network().train(training)
    weights = [p.clone() for p in model.parameters()]
    dropout = []
    model[1].register_forward_hook(lambda m, *_: dropout.append(m.training))
    reestimate_batchnorm(model, batches_of(2))
    assert dropout == [False, False]
    assert [module.training for module in model] == [training] * 4
    assert model[0].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_two_ranks_have_the_statistics_of_one():
    batches = batches_of(4)
    one, models = network(), [network(), network()]
    reestimate_batchnorm(one, batches)
    Ranks(2).run(lambda rank, reduce: reestimate_batchnorm(models[rank], batches[rank::2], reduce=reduce, ranks=2))
    assert torch.equal(models[0][0].running_mean, models[1][0].running_mean)
    assert torch.equal(models[0][0].running_var, models[1][0].running_var)
    torch.testing.assert_close(models[0][0].running_mean, one[0].running_mean)


def test_ranks_combine_means_and_squares():
    batches = batches_of(4)
    models = [network(), network()]
    Ranks(2).run(lambda rank, reduce: reestimate_batchnorm(models[rank], batches[rank::2], reduce=reduce, ranks=2))
    means = torch.stack([torch.stack(batches[rank::2]).mean((0, 1)) for rank in range(2)])
    variances = torch.stack([torch.stack([b.var(0) for b in batches[rank::2]]).mean(0) for rank in range(2)])
    expected = (variances + means**2).mean(0) - means.mean(0) ** 2
    torch.testing.assert_close(models[0][0].running_var, expected)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "re-estimating BatchNorm got no batches: the loader is empty"),
        ([torch.ones(2, 7)], r"Sequential did not take a batch of Tensor\(2, 7\)"),
    ],
)
def test_errors_leave_the_statistics_alone(batches, message):
    model = network()
    model[0].running_mean.fill_(5)
    with pytest.raises(DataError, match=message):
        reestimate_batchnorm(model, batches)
    assert model[0].momentum == 0.3
    assert model.training
    assert model[0].running_mean.tolist() == [5.0] * 3
