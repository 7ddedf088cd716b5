"""What a Trainer has around `Quantize`: order of callbacks, and strategies that shard."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateFinder, ModelSummary, Timer

from lq.callbacks import FineTune, Quantize
from lq.callbacks.trainer.surroundings import check_order, check_strategy, put_running_last
from lq.errors import StateError


def around(*callbacks):
    return SimpleNamespace(callbacks=list(callbacks), strategy=None)


def test_callbacks_that_run_the_module_come_behind_those_of_lq():
    finder, summary, quantize, tuner, timer = LearningRateFinder(), ModelSummary(), Quantize(), FineTune(), Timer()
    trainer = around(finder, summary, quantize, tuner, timer)
    before = trainer.callbacks
    put_running_last(trainer)
    assert trainer.callbacks == [quantize, tuner, finder, summary, timer]
    assert before == [finder, summary, quantize, tuner, timer]  # the Trainer is iterating over it
    last = trainer.callbacks
    put_running_last(trainer)
    assert trainer.callbacks is last


def test_a_copy_of_the_module_comes_after_its_quantizers():
    copying = type("WeightAveraging", (pl.Callback,), {})()
    quantize = Quantize()
    check_order(around(quantize, copying), quantize)
    with pytest.raises(StateError, match="WeightAveraging copies the module before Quantize has attached quantizers"):
        check_order(around(copying, quantize), quantize)


def test_strategies_that_shard_are_refused():
    sharding = type("FSDPStrategy", (), {})()
    with pytest.raises(StateError, match="Quantize does not work with FSDPStrategy, which shards the weights"):
        check_strategy(SimpleNamespace(strategy=sharding))
    check_strategy(SimpleNamespace(strategy=type("DDPStrategy", (), {})()))
