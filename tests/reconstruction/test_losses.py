"""Losses against loops in float64."""

import math

import pytest
import torch

from lq.errors import SpecError
from lq.reconstruction import FisherLoss, KLLoss, LpLoss, RelativeLoss
from lq.reconstruction.losses import loss_of

SHAPES = [(3, 4, 2, 5), (3, 5, 4), (6, 4)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(2)] + [torch.rand(shape, generator=generator)]


def by_loops(shape, output, target, weights, p):
    """A sum over channels, a mean over everything else."""
    channels = shape[1] if len(shape) == 4 else shape[-1]
    places = math.prod(shape) // channels
    values = zip(*(t.double().flatten().tolist() for t in (output, target, weights)), strict=True)
    return sum(w * abs(a - b) ** p for a, b, w in values) / places


@every_shape
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
def test_lp(p, shape):
    output, target, weights = tensors(shape)
    expected = by_loops(shape, output, target, torch.ones(shape), p)
    assert LpLoss(p)(output, target).item() == pytest.approx(expected, rel=1e-5)
    assert LpLoss(p)(output, target, weights).item() == pytest.approx(expected, rel=1e-5)
    assert LpLoss(p)(target, target).item() == 0


@every_shape
def test_only_tokens_are_relative(shape):
    output, target, _ = tensors(shape)
    squared = LpLoss()(output, target).item()
    assert (RelativeLoss()(output, target).item() == pytest.approx(squared, rel=1e-6)) == (len(shape) != 3)


def test_relative_weighs_by_the_variance_of_tokens():
    output, target, _ = tensors((2, 3, 4))
    target[0, 1] *= 100  # a massive activation
    target[1, 2] = 0.5  # no variance
    rows = target.double().flatten(0, 1)
    variances = [sum((v - row.mean()) ** 2 for v in row).item() / 4 for row in rows]
    floor = 0.1 * sorted(variances)[2]  # of six, the lower median
    weights = [1 / (v + floor) for v in variances]
    weights = torch.tensor([[w * 6 / sum(weights)] * 4 for w in weights]).reshape(2, 3, 4)
    assert weights[0, 1, 0] < 1e-3 < weights[1, 2, 0] < 6
    expected = by_loops((2, 3, 4), output, target, weights, 2)
    assert RelativeLoss()(output, target).item() == pytest.approx(expected, rel=1e-4)
    assert RelativeLoss()(target * 0, target * 0).item() == 0


@every_shape
def test_fisher_weighs_squared_errors(shape):
    output, target, weights = tensors(shape)
    assert FisherLoss()(output, target, weights).item() == pytest.approx(
        by_loops(shape, output, target, weights, 2), rel=1e-5
    )
    assert FisherLoss()(output, target).item() == pytest.approx(LpLoss(2)(output, target).item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl(temperature):
    output, target, _ = tensors((5, 4))
    total = 0.0
    for z, t in zip(output.double().tolist(), target.double().tolist(), strict=True):
        q, p = ([math.exp(v / temperature) for v in row] for row in (z, t))
        total += sum(b / sum(p) * math.log(b / sum(p) / (a / sum(q))) for a, b in zip(q, p, strict=True))
    expected = total / 5 * temperature**2
    assert KLLoss(temperature)(output, target).item() == pytest.approx(expected, rel=1e-4)
    assert abs(KLLoss()(target, target).item()) < 1e-6


@pytest.mark.parametrize("loss", [LpLoss(), LpLoss(2.4), RelativeLoss(), FisherLoss(), KLLoss()], ids=repr)
def test_only_fisher_asks_for_weights(loss):
    assert loss.weighted == isinstance(loss, FisherLoss)


@every_shape
def test_a_fisher_loss_of_equal_weights_does_not_depend_on_the_batch(shape):
    """The mean over samples: two copies of a batch have the loss of one."""
    output, target, weights = tensors(shape)
    doubled = [torch.cat([t, t]) for t in (output, target, weights)]
    for loss in (LpLoss(2.4), FisherLoss()):
        assert loss(*doubled).item() == pytest.approx(loss(output, target, weights).item(), rel=1e-5)


def test_names():
    named = {"relative": RelativeLoss(), "mse": LpLoss(2.0), "fisher": FisherLoss(), "kl": KLLoss()}
    assert {name: loss_of(name) for name in named} == named
    own = lambda output, target, weights: (output - target).sum()  # noqa: E731
    assert loss_of(own) is own


def test_errors():
    names = "'relative', 'mse', 'fisher', 'kl', 'aph', 'dplr', 'global'"
    with pytest.raises(SpecError, match=f"loss='l2' is unknown; use {names}.* or a loss object$"):
        loss_of("l2")
    with pytest.raises(SpecError, match=r"LpLoss\(p=0\): the exponent must be positive"):
        LpLoss(0)
