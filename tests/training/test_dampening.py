"""Dampening: its loss by plain loops, its gradient by autograd, in a Trainer as if it were in the user's loss."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.sites import quantized_layers, weight_quantizer
from lq.callbacks import FineTune, Quantize
from lq.training.dampening import add_dampening
from lq.training.quantized_weights import quantized_weights
from tests.helpers import QUIET, Tiny, assert_same, fit, loader, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def loss_of(model):
    """``sum ||Q(w) - clip(w)||^2`` in operations of autograd, Q(w) a constant."""
    total = torch.zeros(())
    for _, layer in quantized_layers(model):
        weight, quantizer = layer.parametrizations.weight.original, weight_quantizer(layer)
        zero, bits = quantizer.zero_point.detach(), quantizer.bits.detach()
        step = quantizer.layout.spread(quantizer.step, weight)
        low, high = (quantizer.layout.spread(part, weight) for part in (-zero, torch.exp2(bits) - 1 - zero))
        clipped = torch.minimum(torch.maximum(weight, low * step), high * step)
        total = total + (quantizer(weight).detach() - clipped).square().sum()
    return total


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize(
    "spec",
    [lq.QuantSpec(3, signed=True), lq.QuantSpec(3, symmetric=False), lq.QuantSpec((2, 1, 0, 4), signed=True)],
    ids=["symmetric", "zero points", "0 to 4 bits"],
)
def test_gradient_is_that_of_autograd(spec, scale):
    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(nn.Linear(9, 4)), spec, None, first_last=None, estimator="lsq")
    weight = model[0].parametrizations.weight.original
    with torch.no_grad():
        weight.mul_(1.5)  # some are beyond the range
    expected = loss_of(model)
    expected.backward()
    to_weights = weight.grad.clone()
    steps = weight_quantizer(model[0]).log2_step.grad
    torch.testing.assert_close(steps, torch.zeros_like(steps), rtol=0, atol=1e-6)  # none to steps
    assert to_weights.any() and not to_weights.all()
    weight.grad = torch.ones_like(weight)
    found = add_dampening(quantized_weights(model), 0.3, scale)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(weight.grad, 1 + 0.3 * scale * to_weights, rtol=1e-4, atol=1e-6)


def test_loss_is_that_of_a_loop():
    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(nn.Linear(5, 3)), 2, None, first_last=None)
    weight, quantizer = model[0].parametrizations.weight.original, weight_quantizer(model[0])
    total = 0.0
    for row, step in zip(weight.tolist(), quantizer.step.tolist(), strict=True):
        for value in row:
            clipped = min(max(value, -2 * step), step)
            total += (round(clipped / step) * step - clipped) ** 2
    weight.grad = torch.zeros_like(weight)
    assert float(add_dampening(quantized_weights(model), 1.0)) == pytest.approx(total, rel=1e-5)


def test_weights_without_gradients_are_left_alone():
    model = lq.attach(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), 2, None, first_last=None)
    model[1].parametrizations.weight.original.grad = torch.zeros(2, 3)
    assert add_dampening(quantized_weights(model), 1.0) > 0
    assert model[0].parametrizations.weight.original.grad is None
    assert add_dampening([], 1.0) == 0.0


class WithLoss(Tiny):
    """The same loss in the user's own step."""

    strength = 0.3

    def training_step(self, batch, batch_idx):
        done = self.trainer.global_step / self.trainer.estimated_stepping_batches
        factor = self.strength * (1 - math.cos(math.pi * done)) / 2
        return F.cross_entropy(self(batch[0]), batch[1]) + factor * loss_of(self)


class ByHand(Tiny):
    """Manual optimization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def made(cls, seed=0, **kwargs):
    torch.manual_seed(seed)
    return cls(**kwargs)


def chain(**options):
    return [Quantize(3, 3, fold_bn=False), FineTune(quantizer_lr=1e-3, **options)]


@pytest.mark.parametrize(
    ("cls", "options"),
    [(Tiny, {}), (Tiny, {"accumulate_grad_batches": 2}), (Tiny, {"gradient_clip_val": 0.1}), (ByHand, {})],
    ids=["", "accumulated", "clipped", "by hand"],
)
def test_as_if_it_were_in_the_loss(cls, options):
    ours, theirs = made(cls), made(WithLoss)
    fit(ours, chain(dampening=0.3), max_epochs=3, **options)
    fit(theirs, chain(), max_epochs=3, **options)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    plain = made(cls)
    fit(plain, chain(), max_epochs=3, **options)
    assert not torch.allclose(ours.net[3].weight, plain.net[3].weight, atol=1e-4)


def test_weights_end_nearer_to_their_levels():
    ends = []
    for strength in (0.0, 1.0):
        module = tiny()
        fit(module, chain(dampening=strength), max_epochs=12)
        ends.append(float(loss_of(module).detach()))
    assert ends[1] < 0.5 * ends[0]


def test_it_is_logged_without_its_factor():
    module = tiny()
    trainer = fit(module, chain(dampening=0.5), limit_train_batches=1)
    plain, seen = tiny(), []

    class Before(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(float(loss_of(pl_module).detach()))

    quantize, finetune = chain()
    fit(plain, [quantize, Before(), finetune], limit_train_batches=1)
    assert float(trainer.callback_metrics["dampening_loss"]) == pytest.approx(seen[0], rel=1e-5)
    assert "dampening_loss" not in fit(tiny(), chain()).callback_metrics


def test_none_is_the_default():
    ends = []
    for options in ({}, {"dampening": 0.0}):
        module = tiny()
        fit(module, chain(**options))
        ends.append(dict(module.state_dict()))
    assert_same(*ends)


def test_errors():
    with pytest.raises(lq.SpecError, match="dampening=-0.1 is negative"):
        FineTune(dampening=-0.1)
    with pytest.raises(lq.SpecError, match=r"dampening=0\.1 needs the number of steps; set max_epochs or max_steps"):
        fit(tiny(), chain(dampening=0.1), loader(), max_epochs=-1)
