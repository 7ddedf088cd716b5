"""Iterations by the clock: against a clock of the test, and against the same number of iterations asked for."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lq
from lq.reconstruction import time_limit
from lq.reconstruction.options import RunOptions
from lq.reconstruction.time_limit import TimeLimit


def quantized():
    """A network of three layers, calibrated, and its images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8)
    return lq.calibrate(lq.attach(net, 2, 4, first_last=None), [x]), x


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves; an iteration of unit k is measured to take a tenth of its cost."""
    now = SimpleNamespace(seconds=0.0, measured=0)

    def measured(problem, options):
        now.measured += 1
        return problem.cost / 10

    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(time_limit, "seconds_of_step", measured)
    return now


def problem(cost):
    """A unit whose iterations cost as much."""
    return SimpleNamespace(cost=cost, name="unit", inputs=SimpleNamespace(device=torch.device("cpu")))


def test_all_units_get_the_same_number_if_the_speed_stays(clock):
    costs = [1.0, 3.0, 2.0]
    limit = TimeLimit(RunOptions(minutes=2), costs)
    counts = []
    for k, cost in enumerate(costs):
        counts.append(limit.iterations(k, problem(cost)))
        clock.seconds += counts[-1] * cost / 10
    assert counts == pytest.approx([200, 200, 200], abs=1)  # 120 seconds over 0.1 times 6
    assert clock.seconds == pytest.approx(120, abs=0.5)
    assert clock.measured == 1  # afterwards, the units that are done tell


def test_time_that_a_unit_took_too_long_is_missing_later(clock):
    costs = [1.0, 1.0, 1.0]
    limit = TimeLimit(RunOptions(minutes=1), costs)
    first = limit.iterations(0, problem(1.0))
    clock.seconds += 2 * first / 10  # twice as slow as measured
    second = limit.iterations(1, problem(1.0))
    clock.seconds += 2 * second / 10
    third = limit.iterations(2, problem(1.0))
    clock.seconds += 2 * third / 10
    assert second == pytest.approx((60 - 40) / (2 * 0.2), abs=1)
    assert clock.seconds == pytest.approx(60, abs=1)


def test_never_more_than_iterations_and_never_fewer_than_ten(clock):
    assert TimeLimit(RunOptions(minutes=100, iterations=50), [1.0]).iterations(0, problem(1.0)) == 50
    with pytest.warns(UserWarning, match="minutes=0.001 is too little for unit unit: it gets 10 iterations"):
        assert TimeLimit(RunOptions(minutes=0.001), [1.0]).iterations(0, problem(1.0)) == 10


def test_units_that_are_done_cost_nothing(clock):
    limit = TimeLimit(RunOptions(minutes=1), [0.0, 2.0])
    assert limit.iterations(1, problem(2.0)) == pytest.approx(300, abs=1)


def test_ranks_take_the_slowest(clock):
    options = RunOptions(minutes=1, ranks=2, reduce=lambda t, kind: t * 2 if kind == "max" else t, batch_size=32)
    assert TimeLimit(options, [1.0]).iterations(0, problem(1.0)) == pytest.approx(300, abs=1)


@pytest.mark.parametrize("bias_lr", [0.0, 1e-3])
def test_measuring_leaves_no_trace(bias_lr):
    """A unit comes out as with the same number of iterations asked for."""
    model, x = quantized()
    other = copy.deepcopy(model)
    options = {"units": [["0", "1", "2", "3", "4"]], "batch_size": 16, "bias_lr": bias_lr}
    report = lq.reconstruct(model, [x], minutes=0.02, **options)
    count = report.units[0].iterations
    assert 10 <= count < 20_000
    again = lq.reconstruct(other, [x], iterations=count, **options)
    assert again.units[0].curve == report.units[0].curve
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_takes_about_the_time():
    model, x = quantized()
    report = lq.reconstruct(model, [x], units="layer", batch_size=16, minutes=0.05)
    assert len(report.units) == 3
    assert all(unit.iterations > 10 for unit in report.units)
    assert sum(unit.seconds for unit in report.units) < 15


def test_bad_minutes():
    with pytest.raises(lq.SpecError, match="minutes=0 must be positive"):
        lq.reconstruct(*quantized(), minutes=0)
