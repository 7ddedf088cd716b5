"""The arithmetic against scalar float64 loops and finite differences."""

import math

import pytest
import torch
from torch import nn

import lq.quantizer.gradients
from lq.attachment.sites import float_weight, weight_quantizer
from lq.errors import StateError
from lq.quantizer.estimators import EWGS
from lq.quantizer.functional import fake_quantize
from lq.quantizer.rounding import STEP_LIMIT, round_to_grid, step_size


def reference(x, step, low, high, offset=0.0):
    """One value rounded to a grid, in float64."""
    return min(max(round(x / step - offset) + offset, low), high) * step


def reference_gradients(x, step, low, high, offset):
    """The derivatives of one quantized value to the value and to the step, as LSQ's equations 3 to 5 have them."""
    level = x / step
    if low < level < high:
        return 1.0, round(level - offset) + offset - level
    return 0.0, low if level <= low else high


def values(shape, step, offset, generator):
    """Values an eighth of a step or more away from every level, rounding tie and bound, within 11 steps of zero."""
    fraction = torch.randint(1, 4, shape, generator=generator) / 8
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (torch.randint(-10, 10, shape, generator=generator) + fraction * sign + offset) * step


def elements(*tensors):
    """The elements of tensors broadcast to each other, as float64 tuples."""
    return zip(*(t.double().flatten().tolist() for t in torch.broadcast_tensors(*tensors)), strict=True)


def per_channel(*numbers):
    return torch.tensor(numbers).view(-1, 1, 1, 1)


MIXED = (per_channel(-8.0, -0.5, 0.0, -2.0, 0.0, -128.0), per_channel(7.0, 0.5, 0.0, 1.0, 15.0, 127.0))
CASES = {
    "tensor": ((4, 5, 3, 3), (), -8.0, 7.0, 0.0),
    "tensor, step with dimensions": ((4, 5, 3, 3), (1, 1, 1, 1), -8.0, 7.0, 0.0),
    "tensor, unsigned": ((4, 5, 3, 3), (), 0.0, 3.0, 0.0),
    "tensor, zero point": ((4, 5, 3, 3), (), -5.0, 2.0, 0.0),
    "tensor, half steps": ((4, 5, 3, 3), (), -0.5, 0.5, 0.5),
    "tensor, zero bits": ((4, 5, 3, 3), (), 0.0, 0.0, 0.0),
    "channels": ((6, 5, 3, 3), (6, 1, 1, 1), -8.0, 7.0, 0.0),
    "channels, half steps": ((6, 5, 3, 3), (6, 1, 1, 1), -0.5, 0.5, 0.5),
    "channels, of a matrix": ((6, 7), (6, 1), -2.0, 1.0, 0.0),
    "channels along dimension 1": ((5, 6, 3, 3), (1, 6, 1, 1), -8.0, 7.0, 0.0),
    "channels in groups": ((2, 3, 4, 3), (2, 1, 4, 1), -8.0, 7.0, 0.0),
    "one channel per group": ((4, 3, 1, 3), (4, 1, 1, 1), -8.0, 7.0, 0.0),
    "mixed widths": ((6, 5, 3, 3), (6, 1, 1, 1), *MIXED, MIXED[0].frac().abs()),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("block", [1 << 18, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_paper(case, layout, dtype, block, monkeypatch):
    monkeypatch.setattr(lq.quantizer.gradients, "_BLOCK", block)
    shape, step_shape, low, high, offset = CASES[case]
    generator = torch.Generator().manual_seed(1)
    log2_step = torch.randint(-3, 2, step_shape, generator=generator).float()
    step = torch.exp2(log2_step)
    x = LAYOUTS[layout](values(shape, step, offset, generator).to(dtype)).requires_grad_()
    grad = LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype))
    log2_step.requires_grad_()
    fake_quantize(x, log2_step, low, high, offset, gradient_scale=0.3).backward(grad)

    low, high, offset = (torch.as_tensor(bound) for bound in (low, high, offset))
    partial = [reference_gradients(*now) for now in elements(x.detach(), step, low, high, offset)]
    passed = torch.tensor([p for p, _ in partial]).view(shape)
    to_step = torch.tensor([d for _, d in partial], dtype=torch.float64).view(shape)
    expected = (to_step * grad.double()).sum_to_size(step_shape) * math.log(2) * step.double() * 0.3
    assert torch.equal(x.grad, grad * passed.to(dtype))
    assert x.grad.dtype == dtype
    assert log2_step.grad.dtype == torch.float32
    torch.testing.assert_close(log2_step.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_a_scalar_loop(case):
    shape, step_shape, low, high, offset = CASES[case]
    generator = torch.Generator().manual_seed(2)
    log2_step = torch.rand(step_shape, generator=generator) * 4 - 3
    step = torch.exp2(log2_step)
    x = values(shape, step, offset, generator)
    bounds = [torch.as_tensor(bound) for bound in (low, high, offset)]
    expected = torch.tensor([reference(*now) for now in elements(x, step, *bounds)]).view(shape)
    for got in (
        round_to_grid(x, step, low, high, offset),
        fake_quantize(x, log2_step, low, high, offset),
        fake_quantize(x.clone().requires_grad_(), log2_step, low, high, offset).detach(),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_ties_round_half_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert round_to_grid(x, torch.tensor(1.0), -8, 7).tolist() == [round(v) for v in x.tolist()]


@pytest.mark.parametrize("case", CASES)
def test_fixed_steps_get_no_gradient_and_values_the_same(case):
    shape, step_shape, low, high, offset = CASES[case]
    generator = torch.Generator().manual_seed(3)
    log2_step = torch.zeros(step_shape)
    x = values(shape, torch.ones(step_shape), offset, generator)
    grad = torch.randn(shape, generator=generator)
    fixed, learned = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(fixed, log2_step, low, high, offset).backward(grad)
    fake_quantize(learned, log2_step.clone().requires_grad_(), low, high, offset).backward(grad)
    assert log2_step.grad is None
    assert torch.equal(fixed.grad, learned.grad)


def test_step_learns_when_values_need_no_gradient():
    log2_step = torch.tensor(0.0, requires_grad=True)
    fake_quantize(torch.tensor([0.25, 9.0]), log2_step, -2, 1).sum().backward()
    assert log2_step.grad.item() == pytest.approx(math.log(2) * (-0.25 + 1))


def central_difference(f, at, by=1 / 64):
    return (f(at + by) - f(at - by)) / (2 * by)


@pytest.mark.parametrize(("x", "low", "high", "offset"), [(-9.3, -4, 3, 0), (7.7, -4, 3, 0), (5.2, -0.5, 0.5, 0.5)])
def test_step_gradient_of_clipped_values_is_a_finite_difference(x, low, high, offset):
    log2_step = torch.tensor(-0.3, requires_grad=True)
    fake_quantize(torch.tensor([x]), log2_step, low, high, offset).sum().backward()
    expected = central_difference(lambda t: reference(x, 2**t, low, high, offset), -0.3)
    assert log2_step.grad.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("x", "offset"), [(1.37, 0.0), (-2.11, 0.0), (0.31, 0.5)])
def test_step_gradient_inside_is_a_finite_difference_with_the_rounding_frozen(x, offset):
    low, high = (-0.5, 0.5) if offset else (-4, 3)
    log2_step = torch.tensor(-0.3, requires_grad=True)
    fake_quantize(torch.tensor([x]), log2_step, low, high, offset).sum().backward()
    level = x / 2**-0.3
    rounding = round(level - offset) + offset - level
    assert low < level < high
    expected = central_difference(lambda t: 2**t * (x / 2**t + rounding), -0.3)
    assert log2_step.grad.item() == pytest.approx(expected, rel=1e-3)


def test_gradient_scale_per_channel():
    x = torch.tensor([[9.0], [9.0]])
    log2_step = torch.zeros(2, 1, requires_grad=True)
    fake_quantize(x, log2_step, -2, 1, gradient_scale=torch.tensor([[2.0], [5.0]])).sum().backward()
    torch.testing.assert_close(log2_step.grad, math.log(2) * torch.tensor([[2.0], [5.0]]))


@pytest.mark.parametrize(("log2_step", "expected"), [(-1e6, 2.0**-STEP_LIMIT), (1e6, 2.0**STEP_LIMIT), (0.0, 1.0)])
def test_steps_are_positive_and_finite(log2_step, expected):
    assert step_size(torch.tensor(log2_step)).item() == expected
    assert math.isfinite(1 / step_size(torch.tensor(log2_step)).item())


BOUNDS = {
    "tensor": (torch.tensor(0.0), -2.0, 1.0),
    "channels": (torch.zeros(1, 1).expand(2, 1).contiguous(), -2.0, 1.0),
    "mixed widths": (torch.zeros(2, 1), torch.tensor([[-2.0], [-2.0]]), torch.tensor([[1.0], [1.0]])),
}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("learned", [False, True])
def test_the_mask_is_open_at_both_bounds(kind, learned):
    log2_step, low, high = BOUNDS[kind]
    x = torch.tensor([[-2.125, -2.0, -1.875, 0.0, 0.875, 1.0, 1.125]] * 2, requires_grad=True)
    fake_quantize(x, log2_step.clone().requires_grad_(learned), low, high).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]] * 2


# --- second derivatives, transforms of torch.func ---------------------------------------------------------------------


def prepared(case, seed=2):
    shape, step_shape, low, high, offset = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    log2_step = torch.randint(-3, 2, step_shape, generator=generator).float()
    x = values(shape, torch.exp2(log2_step), offset, generator)
    return x, log2_step, (low, high, offset), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_that_will_be_differentiated_are_the_same(case, kept):
    x, log2_step, bounds, grad = prepared(case)
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5).float() if kept else None
    found = []
    for create_graph in (False, True):
        leaves = x.clone().requires_grad_(), log2_step.clone().requires_grad_()
        y = fake_quantize(*leaves, *bounds, gradient_scale=0.3, kept=mask)
        found.append(torch.autograd.grad(y, leaves, grad, create_graph=create_graph))
    for plain, differentiable in zip(*found, strict=True):
        torch.testing.assert_close(differentiable.detach(), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case):
    """The gradient to the values is ``grad`` inside the grid: its derivative to ``grad`` is 1 there, to the rest 0."""
    x, log2_step, bounds, grad = prepared(case)
    x.requires_grad_(), log2_step.requires_grad_(), grad.requires_grad_()
    y = fake_quantize(x, log2_step, *bounds)
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    second = torch.autograd.grad((first * weights).sum(), [grad, x, log2_step], allow_unused=True)
    grids = [torch.as_tensor(bound) for bound in bounds]
    step = torch.exp2(log2_step.detach())
    inside = torch.tensor([reference_gradients(*now)[0] for now in elements(x.detach(), step, *grids)]).view(x.shape)
    torch.testing.assert_close(second[0], weights * inside.to(weights))
    assert all(part is None or not part.any() for part in second[1:])


@pytest.mark.parametrize("case", ["tensor", "channels"])
def test_transforms_of_torch_func(case):
    x, log2_step, bounds, grad = prepared(case)
    leaves = x.clone().requires_grad_(), log2_step.clone().requires_grad_()
    y = fake_quantize(*leaves, *bounds, gradient_scale=0.3)
    expected = torch.autograd.grad(y, leaves, grad)
    loss = lambda a, b: (fake_quantize(a, b, *bounds, gradient_scale=0.3) * grad).sum()  # noqa: E731
    for found, other in zip(torch.func.grad(loss, (0, 1))(x, log2_step), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
    rows = torch.func.vmap(lambda a: fake_quantize(a, log2_step, *bounds))(torch.stack([x, x + 1]))
    assert torch.equal(rows[0], y.detach())


def test_estimators_without_second_derivatives_say_so():
    x = torch.randn(4, 3, requires_grad=True)
    y = fake_quantize(x, torch.tensor(-1.0), -2, 1, backward=EWGS())
    with pytest.raises(StateError, match="gradients of EWGS have no derivatives, as gradient penalties"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_sparse_gradients_of_embeddings():
    """Rows that were looked up, as without quantization; the same values as with dense gradients."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 2))
        lq.attach(net, 4, None, first_last=None, estimator="lsq")
        net(torch.tensor([1, 1, 7])).square().sum().backward()
        weight, quantizer = float_weight(net[0]), weight_quantizer(net[0])
        assert weight.grad.is_sparse == sparse
        found.append((weight.grad.to_dense(), quantizer.log2_step.grad))
        if sparse:
            before = weight.detach().clone()
            torch.optim.SparseAdam([weight], lr=0.1).step()
            assert (weight != before).any(1).nonzero().flatten().tolist() == [1, 7]
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
