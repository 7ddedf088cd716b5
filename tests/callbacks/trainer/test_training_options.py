"""The options of callbacks that train: defaults, checks, and the optimizers that they stand for."""

import pytest
import torch
from torch import nn

from lq.callbacks import FineTune, LearnNoiseScale
from lq.callbacks.trainer.training_options import RATE, FineTuneOptions, LearnNoiseScaleOptions
from lq.errors import SpecError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, r"schedule='step' is unknown; use one of \('cosine', 'noise_scale', None\)"),
        ({"distill_loss": "mse"}, r"distill_loss='mse' is unknown; use one of \('kl', 'symmetric_kl', 'features'\)"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"quantizer_lr": -1.0}, "quantizer_lr=-1.0 must be positive"),
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"warmup": 3}, "warmup=3 belongs to schedule='cosine' or 'noise_scale', and is not negative"),
        ({"warmup": -1, "schedule": "cosine"}, "warmup=-1 belongs to"),
    ],
)
@pytest.mark.parametrize("callback", [FineTune, LearnNoiseScale])
def test_wrong_options_fail_at_once(callback, options, message):
    with pytest.raises(SpecError, match=message):
        callback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 17}, "bits=17 is not a width"),
        ({"until": 0}, "until=0 is no share of a run; give a number above 0, at most 1"),
        ({"budget": {"latency": 1}}, "budget"),
    ],
)
def test_wrong_options_of_learned_widths(options, message):
    with pytest.raises(SpecError, match=message):
        LearnNoiseScale(**options)


def test_an_estimator_that_is_unknown():
    with pytest.raises(SpecError, match="estimator='pact' is unknown"):
        FineTune("pact")


def test_rates_and_optimizers():
    weights = [nn.Parameter(torch.zeros(2))]
    tuned = FineTuneOptions(momentum=0.5, weight_decay=0.1)
    assert tuned.rate == 1e-3
    group = tuned.optimizer(weights, 0.2).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.5, 0.1)
    assert LearnNoiseScaleOptions().rate == RATE
    assert LearnNoiseScaleOptions(quantizer_lr=0.3).rate == 0.3
    assert type(LearnNoiseScaleOptions().optimizer(weights, 0.2)) is torch.optim.RAdam
