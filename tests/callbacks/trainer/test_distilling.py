"""Distillation in training: the gradient of the summed loss, and which module gives the logits."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.attachment.sites import float_weight, quantizers
from lq.callbacks import FineTune
from tests.callbacks.training import quantize
from tests.helpers import QUIET, Tiny, fit, loader, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def by_hand_loss(module, teacher, batch, weight, temperature):
    """Loss of the training step plus the distillation loss, in one graph."""
    x, y = batch
    logits = module.net(x)
    with torch.no_grad():
        target = teacher(x)
    student, target = (F.log_softmax(t / temperature, -1) for t in (logits, target))
    divergence = (target.exp() * (target - student)).sum(-1).mean()
    return F.cross_entropy(logits, y) + weight * temperature**2 * divergence


class Gradients(pl.Callback):
    """Gradients right before the first optimizer step; takes no step further."""

    def on_after_backward(self, trainer, pl_module):
        self.found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 4.0), (3.0, 2.0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_is_that_of_the_summed_loss(weight, temperature, accumulate):
    module, watched = tiny(), Gradients()
    tuner = FineTune(distill=weight, temperature=temperature)
    data = loader(8 * accumulate, batch=8)
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    fit(module, [quantize(calibration_samples=8), tuner, watched], data, **options)

    other = tiny()
    fit(other, [quantize(calibration_samples=8)], data, max_epochs=0)
    lq.set_estimator(other, "lsq")
    teacher = float_copy(other.net)
    other.train()
    for batch in data:
        (by_hand_loss(other, teacher, batch, weight, temperature) / accumulate).backward()
    expected = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    plain = tiny()
    assert watched.found.keys() == expected.keys() and len(expected) > len(list(plain.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(watched.found[name], gradient, rtol=1e-3, atol=1e-5)


def test_distillation_changes_training():
    ends = []
    for weight in (0.0, 5.0):
        module = tiny()
        fit(module, [quantize(), FineTune(distill=weight)])
        ends.append(module.net[8].weight.detach())
    assert not torch.equal(*ends)


def test_distill_loss_is_logged_and_teacher_is_float():
    module, tuner = tiny(), FineTune(distill=1.0)

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.teacher = tuner._distillation.distiller.teacher
            self.weight = float_weight(pl_module.net[0]).detach().clone()

    look = Look()
    made = fit(module, [quantize(), tuner, look])
    assert made.callback_metrics["distill_loss"] > 0
    assert not list(quantizers(look.teacher))
    assert torch.equal(look.teacher[0].weight, look.weight)  # it did not learn
    assert not look.teacher.training
    assert tuner._distillation.distiller is None


@pytest.mark.parametrize("name", ["net", "net.8"])
def test_distill_from_names_the_module(name):
    made = fit(tiny(), [quantize(), FineTune(distill=1.0, distill_from=name)])
    assert made.callback_metrics["distill_loss"] >= 0


def test_distill_from_an_unknown_module():
    with pytest.raises(lq.PatternError, match="distill_from='nett' is no module of Tiny; it has net"):
        fit(tiny(), [quantize(), FineTune(distill=1.0, distill_from="nett")])


def test_distill_from_a_module_that_is_not_called():
    class Unused(Tiny):
        def __init__(self):
            super().__init__()
            self.spare = nn.Sequential(nn.Linear(2, 2))

    module = Unused()
    with pytest.raises(lq.StateError, match="name one that it calls, and that gives the logits, with distill_from="):
        fit(module, [quantize(exclude="spare"), FineTune(distill=1.0, distill_from="spare")])


def test_distill_from_a_module_without_logits():
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), None

    module = tiny()
    module.net = Pair(*module.net)
    module.forward = lambda x: module.net(x)[0]
    with pytest.raises(lq.StateError, match="gives a tuple; name the module that gives logits with distill_from="):
        fit(module, [quantize(), FineTune(distill=1.0)])
