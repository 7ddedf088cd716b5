"""Schedules of the learning rate, against their formulas."""

import math

import pytest
import torch

from lq.callbacks.trainer.schedules import cosine, noise_scale, scheduler


def rates(factor, steps, warmup=0, **group):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0].update(group)
    made, found = scheduler(optimizer, factor, warmup), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return found


def test_cosine_goes_to_zero_and_stays():
    expected = [0.1 * (1 + math.cos(math.pi * min(k, 10) / 10)) / 2 for k in range(12)]
    assert rates(lambda step: cosine(step, 10), 12) == pytest.approx(expected)
    assert rates(lambda step: cosine(step, 10), 12)[10] == pytest.approx(0, abs=1e-12)


def test_noise_scale_rule_waits_for_the_targets():
    assert rates(lambda step: noise_scale(step, 10_000, None), 5) == [0.1] * 5
    found = rates(lambda step: noise_scale(step, 1e5, 3), 6)
    assert found == pytest.approx([0.1] * 4 + [0.1 * 0.9985, 0.1 * 0.9985**2])
    assert noise_scale(500, math.inf, 100) == pytest.approx(0.9985**400)


def test_noise_scale_rule_comes_down_to_a_hundredth_in_short_runs():
    assert noise_scale(200, 200, 100) == pytest.approx(0.01)
    assert noise_scale(150, 200, 100) == pytest.approx(0.1)
    assert noise_scale(100_000, 100_000, 100) < 1e-6


def test_warmup_rises_linearly_to_the_schedule():
    found = rates(lambda step: 1.0, 6, warmup=4)
    assert found == pytest.approx([0.1 * min((k + 1) / 5, 1) for k in range(6)])


def test_a_cyclic_schedule_is_replaced_from_its_peak():
    found = rates(lambda step: 1.0, 2, max_lr=0.5, min_lr=1e-6, max_momentum=0.9, base_momentum=0.8)
    assert found == [0.5, 0.5]
