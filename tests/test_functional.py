"""Rounding and its gradients against scalar float64 loops and the formulas of LSQ."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lq.functional
from lq.functional import fake_quantize, round_to_grid


def scalar(x: float, step: float, low: float, high: float, offset: float) -> float:
    return min(max(round(x / step - offset) + offset, low), high) * step


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from([0, 1, 2, 3, 4, 8, 16]), seed=st.integers(0, 10**6), step=st.floats(1e-3, 10))
def test_rounding_is_that_of_a_scalar_loop(bits: int, seed: int, step: float) -> None:
    offset = 0.5 if bits == 1 else 0.0
    low, high = (-0.5, 0.5) if bits == 1 else (-float(2**bits // 2), float(2**bits - 1 - 2**bits // 2))
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * step * 2 ** max(bits - 1, 0)
    away = ((x.double() / step - offset) % 1 - 0.5).abs() > 1e-3
    got = round_to_grid(x, torch.tensor(step), low, high, offset)
    expected = torch.tensor([scalar(v, float(torch.tensor(step)), low, high, offset) for v in x.tolist()])
    torch.testing.assert_close(got[away], expected[away], rtol=1e-5, atol=1e-6)
    assert got.unique().numel() <= 2**bits


def gradients(x: torch.Tensor, step: torch.Tensor, low: object, high: object, offset: object, grad: torch.Tensor):
    """LSQ's equations in float64: gradient to x, gradient to the logarithm of the step."""
    x, step, grad = x.double(), step.double(), grad.double()
    v = x / step
    inside = (v > low) & (v < high)
    rounded = torch.clamp(torch.round(v - offset) + offset, low, high)
    by_step = torch.where(inside, rounded - v, rounded)
    total = (grad * by_step).sum_to_size(step.shape)
    return grad * inside, total * step * math.log(2)


@pytest.mark.parametrize("block", [7, 1 << 18], ids=["blocks", "whole"])
@pytest.mark.parametrize(
    ("shape", "step_shape"), [((8, 5, 3), ()), ((8, 5, 3), (8, 1, 1)), ((8, 5, 3), (1, 5, 1)), ((6, 40), (6, 1))]
)
@pytest.mark.parametrize("bounds", [(-8.0, 7.0, 0.0), (0.0, 15.0, 0.0), (-0.5, 0.5, 0.5), "mixed"])
def test_gradients_are_those_of_lsq(shape, step_shape, bounds, block, monkeypatch) -> None:
    monkeypatch.setattr(lq.functional, "_BLOCK", block)
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).requires_grad_()
    log2_step = (torch.rand(step_shape) - 1).requires_grad_()
    if bounds == "mixed":
        high = torch.randint(0, 4, step_shape).float()
        low, offset = -high - 1, torch.zeros(step_shape)
    else:
        low, high, offset = bounds
    grad = torch.randn(shape)
    fake_quantize(x, log2_step, low, high, offset, gradient_scale=0.25).backward(grad)
    by_x, by_step = gradients(x.detach(), torch.exp2(log2_step.detach()), low, high, offset, grad)
    torch.testing.assert_close(x.grad.double(), by_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log2_step.grad.double(), 0.25 * by_step, rtol=1e-3, atol=1e-4)


def test_gradients_of_half_precision_and_other_layouts() -> None:
    torch.manual_seed(0)
    log2_step = torch.tensor(-1.0, requires_grad=True)
    for x in (torch.randn(4, 6).bfloat16(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        log2_step.grad = None
        values = x.detach().requires_grad_()
        y = fake_quantize(values, log2_step, -2.0, 1.0)
        assert y.dtype == x.dtype
        y.backward(torch.ones_like(y))
        by_x, by_step = gradients(x, torch.tensor(0.5), -2.0, 1.0, 0.0, torch.ones_like(x))
        torch.testing.assert_close(values.grad.double(), by_x.double())
        torch.testing.assert_close(log2_step.grad.double(), by_step, rtol=1e-4, atol=1e-4)


def test_gradient_to_the_step_is_the_finite_difference_outside_the_range() -> None:
    x = torch.tensor([10.0, -10.0, 20.0], dtype=torch.float32)
    weights = torch.tensor([1.0, 2.0, 3.0])
    log2_step = torch.tensor(0.3, requires_grad=True)
    (fake_quantize(x, log2_step, -2.0, 1.0) * weights).sum().backward()
    with torch.no_grad():
        up, down = ((fake_quantize(x, log2_step + d, -2.0, 1.0) * weights).sum() for d in (1e-2, -1e-2))
    torch.testing.assert_close(log2_step.grad, (up - down) / 2e-2, rtol=1e-3, atol=1e-3)
