"""BatchNorm statistics in training: frozen from an epoch on; a warning where there are none."""

import pytest
from torch import nn

from lq.callbacks.trainer.batchnorm import BatchNormStatistics
from lq.errors import NoEffectWarning
from tests.helpers import tiny


def test_they_are_frozen_from_an_epoch_on():
    module = tiny(norm=True).train()
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    statistics = BatchNormStatistics(2, 0)
    statistics.freeze(module, 1)
    assert norms and all(norm.training for norm in norms)
    statistics.freeze(module, 2)
    assert not any(norm.training for norm in norms) and module.training
    BatchNormStatistics(None, 8).freeze(module.train(), 9)
    assert all(norm.training for norm in norms)


@pytest.mark.parametrize("options", [(1, 0), (None, 8)])
def test_a_module_without_any_is_told_of(options):
    with pytest.warns(NoEffectWarning, match="freeze_bn_epoch and reestimate_bn have nothing to do"):
        BatchNormStatistics(*options).check(tiny(norm=False))


def test_nothing_to_do_is_no_warning():
    BatchNormStatistics(None, 0).check(tiny(norm=False))
    BatchNormStatistics(1, 8).check(tiny(norm=True))
