"""Divergence is reported: a loss that is no number, one that rises, a range that runs away; silence otherwise."""

import warnings

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import FineTune, LearnNoiseScale, Quantize
from lq.callbacks.trainer.divergence import DivergenceWatch
from tests.helpers import QUIET, fit, loader, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def watch():
    model = lq.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 4, 4)
    lq.calibrate(model, [torch.randn(8, 4)])
    return DivergenceWatch(list(quantizers(model)))


def see(watched, losses, begin=0):
    for step, loss in enumerate(losses, begin):
        watched.see({"loss": torch.tensor(loss)}, step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_training(value):
    watched = watch()
    see(watched, [1.0, 2.0])
    with pytest.raises(lq.DivergenceError, match=rf"the loss is {value} at step 2; lower the learning rate"):
        see(watched, [value], 2)


def test_a_loss_that_rises_and_stays_is_told_once():
    watched = watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        see(watched, [1.0] * 25 + [3.9] * 200)  # not far enough
        see(watched, [5.0] * 125 + [1.0] * 25)  # it comes back
        see(watched, [5.0] * 125)
    with pytest.warns(lq.DivergenceWarning, match=r"the loss rose from 1 to 5 \(means of 25 steps, step 24\)") as told:
        see(watched, [5.0] * 100)
    assert len(told) == 1


def test_a_range_that_runs_away_is_told_by_name():
    watched = watch()
    with torch.no_grad():
        watched.members[1].log2_step.add_(6)
    with pytest.warns(
        lq.DivergenceWarning, match=rf"the range of {watched.members[1].name} moved by a factor of 2\^6.0"
    ):
        see(watched, [1.0] * 25)
    watched.restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        see(watched, [1.0] * 25)


def test_a_loss_that_is_far_too_high_from_the_first_steps_on():
    watched = watch()
    with pytest.warns(lq.DivergenceWarning, match="the loss rose from 2.4 to 50"):
        see(watched, [1.2] + [50.0] * 199)


def test_a_rise_that_is_expected():
    watched = watch()
    watched.expects_rise = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        see(watched, [0.1] * 25 + [2.0] * 200)


@pytest.mark.parametrize("outputs", [None, torch.tensor(1.0), {"other": 1}])
def test_whatever_the_training_step_returns(outputs):
    watched = watch()
    for step in range(30):
        watched.see(outputs, step)
    assert not watched.warned


STAGES = {
    "ste": lambda: [Quantize(2, 2, fold_bn=False), FineTune("ste")],
    "lsq": lambda: [Quantize(2, 2, fold_bn=False), FineTune("lsq", quantizer_lr=0.3)],
    "lsq_plus": lambda: [Quantize(2, 2, fold_bn=False), FineTune("lsq_plus", quantizer_lr=0.3)],
    "adaptive_ewgs": lambda: [Quantize(2, 2, fold_bn=False), FineTune("adaptive_ewgs", quantizer_lr=0.3)],
    "noise_scale": lambda: [Quantize(8, 8, fold_bn=False), LearnNoiseScale(2, 2, quantizer_lr=0.3, distill=0)],
}


@pytest.mark.parametrize("factor", [10, 1000])
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_300_steps_at_far_too_high_rates(stages, factor):
    module, told = tiny(lr=0.05 * factor), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(module, stages(), loader(32, batch=8), max_epochs=75)
        except (lq.DivergenceError, lq.DataError) as error:
            told.append(str(error))
    told += [str(w.message) for w in caught if issubclass(w.category, lq.DivergenceWarning)]
    for quantizer in quantizers(module):
        assert quantizer.step.isfinite().all() and (quantizer.step > 0).all()
        assert all(p.isfinite().all() for p in quantizer.parameters())
    with torch.no_grad():
        x, y = loader(32, batch=32).dataset.tensors
        loss = nn.functional.cross_entropy(module.train()(x), y)
    assert told or loss < 1.2, "neither reported nor recovered"
