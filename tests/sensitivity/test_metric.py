"""What all metrics of sensitivity share."""

import pytest

from lq.sensitivity import BruteForce, Fisher, HawqV2, OutputDistortion


def own(model, batch):
    return model(batch).sum()


def other(model, batch):
    return model(batch).mean()


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Fisher(), Fisher(loss=own)),
        (Fisher(loss=other), Fisher(loss=other)),
        (Fisher("model", 2.0), Fisher("model", 2.0)),
        (HawqV2(vectors=7), HawqV2(vectors=7, loss=own)),
        (HawqV2(loss=other), HawqV2(loss=other)),
        (OutputDistortion(), OutputDistortion()),
        (BruteForce("loss"), BruteForce("loss")),
    ],
)
def test_a_loss_goes_where_there_is_room_for_one(metric, expected):
    assert metric.with_loss(own) == expected


def test_what_finds_cross_terms():
    assert Fisher().finds_cross_terms and OutputDistortion().finds_cross_terms
    assert not HawqV2().finds_cross_terms and not BruteForce().finds_cross_terms
