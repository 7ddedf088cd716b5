"""BatchNorm statistics in training: frozen from an epoch on, found again at the end; a warning where there are none."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lq.callbacks import FineTune, Quantize
from lq.callbacks.trainer.batchnorm import BatchNormStatistics
from lq.errors import NoEffectWarning
from lq.structure.forward import eval_mode
from tests.callbacks.training import quantize
from tests.helpers import QUIET, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


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


# --- in FineTune ------------------------------------------------------------------------------------------------------


class Statistics(pl.Callback):
    """Running means of the first BatchNorm and its weight at the end of every epoch."""

    def __init__(self):
        self.means, self.weights = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.means.append(pl_module.net[1].running_mean.clone())
        self.weights.append(pl_module.net[1].weight.detach().clone())


def test_freeze_bn_epoch_keeps_running_statistics():
    statistics = Statistics()
    fit(tiny(), [quantize(), FineTune(freeze_bn_epoch=2), statistics], max_epochs=4)
    one, two, three, four = statistics.means
    assert not torch.equal(one, two)
    assert torch.equal(two, three) and torch.equal(three, four)
    assert not torch.equal(statistics.weights[2], statistics.weights[3])  # the affine part is still trained


def test_reestimated_statistics_are_the_mean_over_batches():
    module = tiny()
    fit(module, [quantize(), FineTune(reestimate_bn=32)], max_epochs=2)
    conv, norm = module.net[0], module.net[1]
    batches = [x for x, _ in loader()]
    with eval_mode(module), torch.no_grad():
        mean = torch.stack([conv(x).mean((0, 2, 3)) for x in batches]).mean(0)
        var = torch.stack([conv(x).var((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1


def test_last_validation_sees_reestimated_statistics():
    module = tiny()
    made = trainer([quantize(), FineTune(reestimate_bn=32)])
    made.fit(module, loader(), loader(24))
    assert made.callback_metrics["val_loss"] == made.validate(module, loader(24), verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("kwargs", [{"freeze_bn_epoch": 0}, {"reestimate_bn": 8}])
def test_nothing_to_freeze_is_a_warning(kwargs):
    with pytest.warns(NoEffectWarning, match=r"use Quantize\(fold_bn=False\) to keep them"):
        fit(tiny(), [Quantize(8, 8, fold_bn=True), FineTune(**kwargs)])
