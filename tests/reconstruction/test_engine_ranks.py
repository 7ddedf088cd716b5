"""The loop that fits a unit on several ranks: one gradient, one end."""

import threading

import pytest
import torch

from lq.reconstruction import LpLoss
from lq.reconstruction.rounding import AnnealingSoftmax
from tests.helpers import assert_same
from tests.reconstruction.fitting import Unit, method


def test_gradients_are_averaged_over_ranks():
    """Two ranks with the same samples give what one rank gives; the batch is shared between them."""
    one, two = Unit(), Unit()
    asked = []

    def reduce(tensor, operation):
        asked.append((operation, tuple(tensor.shape)))
        return tensor * 2

    a = one.fit(method(iterations=6, batch_size=4, step_lr=0.02))
    b = two.fit(method(iterations=6, batch_size=8, step_lr=0.02, reduce=reduce, ranks=2))
    assert b.curve == pytest.approx(a.curve, rel=1e-6)
    assert b.before == pytest.approx(a.before, rel=1e-5)
    assert_same(dict(two.model.state_dict()), dict(one.model.state_dict()))
    assert {operation for operation, _ in asked} == {"sum"}


class Ranks:
    """Two threads that reduce tensors together, or fail if they do not meet."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2, timeout=30), [None, None]

    def reduce(self, rank):
        def together(tensor, operation):
            self.given[rank] = tensor.detach().clone()
            self.barrier.wait()
            a, b = self.given
            assert a.shape == b.shape
            found = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}[operation](a, b)
            self.barrier.wait()
            return found

        return together


def test_ranks_stop_together():
    """Though the loss of one of them falls all the time, and that of the other does not."""
    ranks, found = Ranks(), {}
    rule = AnnealingSoftmax(temperature=(1.0, 1e-8), lr=1e-9)
    fitting = {
        "rounding": rule,
        "iterations": 100,
        "early_stop": True,
        "activation_mode": "quantized",
        "batch_size": 16,
    }

    def fit(rank):
        unit, calls = Unit(activations=8), []

        def loss(output, target, weights):
            calls.append(1)
            return LpLoss()(output, target) * (0.9 ** len(calls) if rank else 1.0)

        found[rank] = unit.fit(method(loss=loss, **fitting, reduce=ranks.reduce(rank), ranks=2))

    threads = [threading.Thread(target=fit, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(found) == {0, 1}
    assert found[0].iterations == found[1].iterations
    assert found[0].after == found[1].after
