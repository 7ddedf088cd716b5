"""Error feedback against the same arithmetic one weight at a time, and against nearest rounding."""

import pytest
import torch
from torch import nn

import lq
from lq.reconstruction.rounding.feedback import Correlation, error_feedback


def problem(seed=0, channels=3, inputs=8, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) if correlated else torch.eye(inputs)
    x = torch.randn(400, inputs, generator=generator) @ mix
    values = torch.randn(channels, inputs, generator=generator)
    low, high, offset = (torch.full_like(values, number) for number in (-2.0, 1.0, 0.0))
    return x, values, low, high, offset


def one_at_a_time(values, h, low, high):
    """Optimal Brain Surgeon: after each weight, the inverse of what is left of H, in float64."""
    h = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = h.diagonal().argsort(descending=True).tolist()
    found = torch.empty_like(values)
    for row, weights in enumerate(values.double()):
        rest, left = weights.clone(), list(order)
        while left:
            inverse = torch.linalg.inv(h[left][:, left])
            j = left[0]
            level = rest[j].round().clamp(low, high)
            found[row, j] = level
            rest[left[1:]] -= (rest[j] - level) / inverse[0, 0] * inverse[1:, 0]
            left.pop(0)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_it_is_one_weight_at_a_time(seed):
    x, values, *bounds = problem(seed)
    found = error_feedback(values, x.T @ x, *bounds)
    assert torch.equal(found, one_at_a_time(values, x.T @ x, -2, 1))


def test_inputs_without_correlation_make_it_nearest():
    _, values, *bounds = problem(correlated=False)
    assert torch.equal(error_feedback(values, torch.eye(8), *bounds), values.round().clamp(-2, 1))


def test_the_output_is_nearer_than_by_nearest_rounding():
    ratios = []
    for seed in range(10):
        x, values, low, high, offset = problem(seed)
        levels = error_feedback(values, x.T @ x, 8 * low, 8 * high, offset), values.round()  # nothing is clipped
        ours, nearest = (((found - values) @ x.T).square().sum().item() for found in levels)
        ratios.append(ours / nearest)
    assert sum(ratios) / len(ratios) < 0.6 and max(ratios) < 1.2


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2, bias=False)],
    ids=["strided", "grouped"],
)
def test_vectors_of_a_convolution_are_what_its_kernels_multiply(layer):
    x, seen = torch.randn(2, 4, 9, 9), Correlation(layer)
    vectors = seen._vectors(x)
    kernels = layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1))
    found = (kernels @ vectors.transpose(1, 2)).flatten(0, 1).view(6, 2, -1).transpose(0, 1)
    torch.testing.assert_close(found, layer(x).detach().flatten(2), rtol=1e-4, atol=1e-5)


def test_as_the_start_of_nearest_rounding_it_is_what_weights_get():
    torch.manual_seed(0)
    x = torch.randn(64, 8) @ torch.randn(8, 8)
    losses = {}
    for start in ("float", "feedback"):
        torch.manual_seed(1)
        model = lq.attach(nn.Sequential(nn.Linear(8, 4)), weights=3, first_last=None)
        options = {"rounding": "nearest", "start": start, "units": "layer", "iterations": 1, "drop": 0.0}
        losses[start] = lq.reconstruct(model, [x], **options).units[0].after
    assert losses["feedback"] < losses["float"]
