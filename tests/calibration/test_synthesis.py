"""Synthesis: statistics it reaches, its gradient by hand, and what it leaves alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.calibration.batchnorm import batchnorms
from lq.calibration.synthesis import _distance, _observed, synthesize
from tests.helpers import assert_same, hooks


class BatchNormAct(nn.BatchNorm2d):
    """A BatchNorm whose forward includes the activation, as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


def trained(norm=nn.BatchNorm2d, seed=0):
    """A small network whose BatchNorms have seen smooth images with correlated channels."""
    torch.manual_seed(seed)
    act = nn.Identity if norm is BatchNormAct else nn.ReLU
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), act(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5),
    )  # fmt: skip
    for batchnorm in batchnorms(model):
        batchnorm.momentum = None
    for _ in range(4):
        model(F.avg_pool2d(torch.randn(64, 3, 12, 12), 3, 1) * 3 + torch.randn(64, 1, 1, 1) / 2)
    return model


def mismatch(model, images):
    """Squared distance of the statistics at BatchNorms from the stored ones, in deviations; the worst norm."""
    found = []

    def look(norm, args):
        x = args[0].transpose(0, 1).flatten(1)
        std = norm.running_var.sqrt()
        found.append((((x.mean(1) - norm.running_mean) / std) ** 2 + (x.std(1) / std - 1) ** 2).mean().item())

    looking = [norm.register_forward_pre_hook(look) for norm in batchnorms(model)]
    with torch.no_grad():
        copy.deepcopy(model).eval()(images)
    for handle in looking:
        handle.remove()
    return max(found)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct, nn.SyncBatchNorm])
def test_statistics_are_far_nearer_than_those_of_noise(norm):
    model = trained()
    if norm is BatchNormAct:
        model = trained(BatchNormAct)
    elif norm is nn.SyncBatchNorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    images = synthesize(model, (3, 10, 10), 96, batch_size=48, iterations=80)
    assert images.shape == (96, 3, 10, 10)
    assert not images.requires_grad
    before = mismatch(model, torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(1)))
    assert before > 0.5
    assert mismatch(model, images) < before / 50


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d, (3, 9)), (nn.BatchNorm1d, (3,)), (nn.BatchNorm3d, (3, 4, 4, 4))]
)
def test_other_dimensions(norm, shape):
    torch.manual_seed(0)
    model = nn.Sequential(norm(3))
    model[0].running_mean.copy_(torch.tensor([-0.4, 0.0, 0.3]))
    model[0].running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    images = synthesize(model, shape, 32, batch_size=32, iterations=60).transpose(0, 1).flatten(1)
    # the input is asked to have mean 0 and deviation 1 as well: the optimum in between
    mean, std = model[0].running_mean, model[0].running_var.sqrt()
    torch.testing.assert_close(images.mean(1), mean / (1 + std**2), atol=0.02, rtol=0)
    torch.testing.assert_close(images.std(1), (1 + 1 / std) / (1 + 1 / std**2), atol=0.03, rtol=0)


def test_loss_and_gradient_by_hand():
    model = trained().double().eval()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with _observed(model) as seen:
        loss = _distance(model, x, seen)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.zeros((), dtype=torch.float64)
    by_hand = x.detach().clone().requires_grad_()
    tensor, stored = by_hand, [(torch.zeros(3).double(), torch.ones(3).double(), 0.0)]
    inputs = [tensor]
    for layer in model:
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm1d)):
            inputs.append(tensor)
            stored.append((layer.running_mean, layer.running_var, layer.eps))
        tensor = layer(tensor)
    for tensor, (mean, var, eps) in zip(inputs, stored, strict=True):
        for c in range(tensor.shape[1]):
            values, deviation = tensor[:, c].flatten(), math.sqrt(var[c] + eps)
            m = values.sum() / len(values)
            s = (((values - m) ** 2).sum() / len(values) + eps).sqrt()
            expected = expected + (((m - mean[c]) / deviation) ** 2 + (s / deviation - 1) ** 2) / tensor.shape[1]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, by_hand)[0], rtol=1e-9, atol=1e-13)


def test_model_and_random_state_are_left_alone():
    model = trained().train()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes, hooked = [m.training for m in model.modules()], hooks(model)
    asking, versions = ([p.requires_grad for p in model.parameters()], [p._version for p in model.parameters()])
    state = torch.get_rng_state()
    synthesize(model, (3, 8, 8), 8, batch_size=4, iterations=2)
    assert torch.equal(state, torch.get_rng_state())
    assert_same(dict(model.state_dict()), dict(before))
    assert ([m.training for m in model.modules()], hooks(model)) == (modes, hooked)
    assert ([p.requires_grad for p in model.parameters()], [p._version for p in model.parameters()]) == (
        asking,
        versions,
    )
    assert all(p.grad is None for p in model.parameters())


def test_what_fails_leaves_the_model_alone():
    model = trained().train()
    hooked = hooks(model)
    with pytest.raises(lq.DataError, match=r"did not take a batch of Tensor\(4, 5, 8, 8\)"):
        synthesize(model, (5, 8, 8), 4, iterations=1)
    assert hooks(model) == hooked
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_seed_decides_and_callers_grad_mode_does_not():
    model = trained()
    first = synthesize(model, (3, 8, 8), 8, batch_size=4, iterations=3)
    with torch.no_grad():
        torch.manual_seed(5)
        assert torch.equal(synthesize(model, (3, 8, 8), 8, batch_size=4, iterations=3), first)
    other = synthesize(model, (3, 8, 8), 8, batch_size=4, iterations=3, seed=1)
    distances = torch.cdist(torch.cat([first, other]).flatten(1), torch.cat([first, other]).flatten(1))
    assert (distances + 100 * torch.eye(16)).min() > 5  # no image twice


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shares_are_the_same_samples_for_any_number_of_ranks(ranks):
    model, batches = trained(), []
    options = {"batch_size": 4, "iterations": 2}

    def note(numbers):
        batches.extend(numbers)
        return numbers

    whole = synthesize(model, (3, 8, 8), 14, **options).tensor_split(4)
    shares = [
        synthesize(model, (3, 8, 8), 14, **options, rank=rank, ranks=ranks, progress=note) for rank in range(ranks)
    ]
    for rank, share in enumerate(shares):
        assert torch.equal(share, torch.cat([*whole[rank::ranks], torch.empty(0, 3, 8, 8)]))
    assert sorted(batches) == [0, 1, 2, 3]


def test_model_decides_the_dtype():
    assert synthesize(trained().double(), (3, 8, 8), 4, iterations=1).dtype == torch.float64


@pytest.mark.parametrize("name", ["samples", "batch_size", "iterations", "ranks"])
def test_numbers_that_are_too_small(name):
    with pytest.raises(lq.SpecError, match=rf"{name}=0; synthesis needs at least [12]"):
        synthesize(trained(), (3, 8, 8), **{name: 0})


def test_quantized_folded_and_plain_models_are_refused():
    model = trained()
    quantized = lq.attach(copy.deepcopy(model), 8, None)
    with pytest.raises(lq.StateError, match=r"works on the float model, Sequential has quantizers; use it before"):
        synthesize(quantized, (3, 8, 8))
    folded = model[:6]
    lq.fold_batchnorm(folded)
    with pytest.raises(lq.StateError, match=r"has none; use it before lq.fold_batchnorm, or.*calibrate on real data"):
        synthesize(folded, (3, 8, 8))


def test_norms_that_are_not_called():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return x

    with pytest.raises(lq.StateError, match="Idle ran without calling a BatchNorm"):
        synthesize(Idle(), (3, 8, 8), 4, iterations=1)


def test_divergence():
    with pytest.raises(lq.DataError, match=r"diverged at lr=1e\+30: samples have NaN or Inf; use a smaller lr"):
        synthesize(trained(), (3, 8, 8), 4, iterations=3, lr=1e30)
