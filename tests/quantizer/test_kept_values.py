"""`fake_quantize(kept=)`: values that stay as they are, and the gradients of a mixture, against scalar loops."""

import math

import pytest
import torch

from lq.quantizer.functional import fake_quantize
from tests.quantizer.test_functional import CASES, LAYOUTS, elements, reference, reference_gradients, values


def mask(shape, generator, share=0.5):
    return (torch.rand(shape, generator=generator) < share).float()


def prepared(case, seed=1):
    shape, step_shape, low, high, offset = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    log2_step = torch.randint(-3, 2, step_shape, generator=generator).float()
    x = values(shape, torch.exp2(log2_step), offset, generator)
    return x, log2_step, (low, high, offset), mask(shape, generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values(case, learned):
    x, log2_step, bounds, kept, _ = prepared(case)
    got = fake_quantize(x, log2_step.requires_grad_(learned), *bounds, kept=kept).detach()
    grids = [torch.as_tensor(bound) for bound in bounds]
    rounded = [reference(*now) for now in elements(x, torch.exp2(log2_step.detach()), *grids)]
    expected = torch.where(kept.bool(), x, torch.tensor(rounded, dtype=torch.float32).view(x.shape))
    assert torch.equal(got[kept.bool()], x[kept.bool()])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert kept.any() and not kept.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, layout, dtype):
    x, log2_step, bounds, kept, grad = prepared(case)
    x = LAYOUTS[layout](x.to(dtype)).requires_grad_()
    grad, log2_step = LAYOUTS[layout](grad.to(dtype)), log2_step.requires_grad_()
    fake_quantize(x, log2_step, *bounds, gradient_scale=0.3, kept=kept).backward(grad)
    grids = [torch.as_tensor(bound) for bound in bounds]
    step = torch.exp2(log2_step.detach())
    partial = [reference_gradients(*now) for now in elements(x.detach(), step, *grids)]
    inside = torch.tensor([p for p, _ in partial]).view(x.shape)
    to_step = torch.tensor([d for _, d in partial], dtype=torch.float64).view(x.shape)
    passed = torch.where(kept.bool(), 1.0, inside)
    to_step = torch.where(kept.bool(), 0.0, to_step)
    expected = (to_step * grad.double()).sum_to_size(step.shape) * math.log(2) * step.double() * 0.3
    assert torch.equal(x.grad, grad * passed.to(dtype))
    torch.testing.assert_close(log2_step.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["tensor", "channels", "mixed widths"])
def test_fixed_steps(case):
    x, log2_step, bounds, kept, grad = prepared(case)
    fixed, learned = (x.clone().requires_grad_() for _ in range(2))
    fake_quantize(fixed, log2_step, *bounds, kept=kept).backward(grad)
    fake_quantize(learned, log2_step.clone().requires_grad_(), *bounds, kept=kept).backward(grad)
    assert torch.equal(fixed.grad, learned.grad)


@pytest.mark.parametrize("case", ["tensor", "tensor, zero point", "channels"])
def test_learned_bounds(case):
    """A bound's gradient is that of the values beyond it that are rounded."""
    x, log2_step, (low, high, offset), kept, grad = prepared(case)
    low, high = (torch.full(log2_step.shape, float(b)).requires_grad_() for b in (low, high))
    log2_step.requires_grad_()
    fake_quantize(x, log2_step, low, high, offset, kept=kept).backward(grad)
    step = torch.exp2(log2_step.detach())
    levels, free = x / step, 1 - kept
    for bound, beyond in ((low, levels < low), (high, levels > high)):
        expected = (grad * step * free * beyond).sum_to_size(step.shape)
        torch.testing.assert_close(bound.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_none_and_all(case):
    x, log2_step, bounds, _, grad = prepared(case)
    found = []
    for kept in (None, torch.zeros_like(x), torch.ones_like(x)):
        leaf, step = x.clone().requires_grad_(), log2_step.clone().requires_grad_()
        y = fake_quantize(leaf, step, *bounds, kept=kept)
        y.backward(grad)
        found.append((y.detach(), leaf.grad, step.grad))
    for a, b in zip(*found[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    y, to_x, to_step = found[2]
    assert torch.equal(y, x) and torch.equal(to_x, grad)
    torch.testing.assert_close(to_step, torch.zeros_like(to_step), rtol=0, atol=2e-4)


def test_a_mask_in_another_order_of_memory():
    generator = torch.Generator().manual_seed(0)
    x, kept = torch.randn(4, 6, generator=generator), mask((6, 4), generator).t()
    found = []
    for given in (kept, kept.contiguous()):
        leaf, step = x.clone().requires_grad_(), torch.tensor(-1.0, requires_grad=True)
        fake_quantize(leaf, step, -2, 1, kept=given).square().sum().backward()
        found.append((leaf.grad, step.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_values_themselves_stay():
    x, log2_step, bounds, kept, _ = prepared("tensor")
    before = x.clone(), kept.clone()
    fake_quantize(x, log2_step, *bounds, kept=kept)
    fake_quantize(x, log2_step.requires_grad_(), *bounds, kept=kept).sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(kept, before[1])
