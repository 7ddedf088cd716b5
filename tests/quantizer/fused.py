"""The kernels against the operations of torch, value by value.

`test_triton_kernels.py` runs these tests in a process of its own, where Triton's interpreter runs the kernels.
"""

import warnings

import pytest
import torch

from lq.errors import NoEffectWarning
from lq.quantizer import kernels
from lq.quantizer.estimators import EWGS, LSQ, AdaptiveEWGS, NoiseScale
from lq.quantizer.functional import fake_quantize
from lq.quantizer.gradients import Sums, gradients
from lq.quantizer.places import Places
from lq.quantizer.rounding import alike, mixed, round_to_grid

triton_kernels = pytest.importorskip(
    "lq.quantizer.triton_kernels", reason="triton is not installed", exc_type=ImportError
)
CPU = torch.device("cpu")

SHAPES = {
    "a number": ((), ()),
    "tensor": ((3, 700), ()),
    "tensor of many blocks": ((10, 19, 7, 7), ()),
    "channels": ((6, 5, 3, 3), (6, 1, 1, 1)),
    "many small channels": ((70, 1, 3, 3), (70, 1, 1, 1)),
    "channels of more than a tile": ((3, 2100), (3, 1)),
    "channels along dimension 1": ((5, 6, 3, 3), (1, 6, 1, 1)),
    "channels along the last": ((50, 37), (1, 37)),
    "channels in groups": ((2, 3, 4, 3), (2, 1, 4, 1)),
    "one channel per group": ((4, 3, 1, 3), (4, 1, 1, 1)),
}
GRIDS = ["numbers", "half steps", "one tensor each", "each channel its own", "number and tensor"]


def grid(name, shape):
    """Bounds and offset of a kind, for steps of a shape."""
    if name == "half steps":
        return -0.5, 0.5, 0.5
    if name == "one tensor each":
        return torch.tensor(-3.0), torch.tensor(4.0), torch.tensor(0.0)
    if name == "number and tensor":
        return 0.0, torch.full(shape, 6.5), 0.0
    if name == "each channel its own":
        low = -torch.arange(torch.Size(shape).numel()).remainder(5).float().view(shape)
        return low, low + 5, torch.where(low == -1, 0.5, 0.0)
    return -4.0, 3.0, 0.0


@pytest.fixture(autouse=True)
def proven():
    """The kernels are used."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        assert kernels.proven(CPU)


def setting(shape, step_shape, dtype, seed=0):
    """Values of which many are ties, levels and bounds exactly; gradients; steps."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.rand(step_shape, generator=generator) + 0.3
    step = torch.where(torch.rand(step_shape, generator=generator) < 0.5, torch.exp2(step.log2().round()), step)
    exact = torch.randint(-14, 15, shape, generator=generator) / 2 * step
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, exact, torch.randn(shape, generator=generator) * 4)
    kept = (torch.rand(shape, generator=generator) < 0.3).float()
    return x.to(dtype), torch.randn(shape, generator=generator).to(dtype), step, kept


def check(case, bounds, dtype, keeps, device):
    """Values bit for bit, gradients to values too, sums within what float32 sums differ by."""
    shape, step_shape = SHAPES[case]
    x, grad, step, kept = (t.to(device) for t in setting(shape, step_shape, dtype))
    low, high, offset = (t.to(device) if isinstance(t, torch.Tensor) else t for t in grid(bounds, step_shape))
    kept = kept if keeps else None
    if case == "channels in groups":
        assert kernels.fused_places(x, step, (low, high, offset), kept) is None
        return
    expected = mixed(round_to_grid(x.float(), step, low, high, offset), x.float(), kept).to(dtype)
    assert torch.equal(kernels.rounded(x, step, low, high, offset, kept), expected)

    low, high = alike(low, high)
    for to_bounds, rule in [(False, None), (True, None), (True, NoiseScale()), (False, EWGS(0.3))]:
        reference, sums = (Sums(step, low, high, to_bounds, rule) for _ in range(2))
        expected = gradients(grad.float(), x.float(), offset, reference, kept)
        found = kernels.fused_gradients(grad, x, offset, sums, kept)
        assert found.dtype == dtype and found.shape == x.shape
        if rule is None or not rule.weighs:
            assert torch.equal(found, expected.to(dtype))
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)
        size = (grad.float().abs() * (x.float() / step).abs()).sum_to_size(step.shape) + 1
        for part in ("product", "total", "outside", "square"):
            error = (getattr(sums, part) - getattr(reference, part)).abs()
            assert getattr(sums, part).shape == getattr(reference, part).shape
            assert (error <= 1e-6 * size).all(), part
    expected = gradients(grad.float(), x.float(), offset, Sums(step, low, high, False, None), kept).to(dtype)
    alone = kernels.fused_gradients(grad, x, offset, Sums(step, low, high, False, None, wanted=False), kept)
    assert torch.equal(alone, expected)


@pytest.mark.parametrize(
    ("dtype", "keeps"), [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("bounds", GRIDS)
@pytest.mark.parametrize("case", SHAPES)
def test_values_and_gradients_are_those_of_the_operations(case, bounds, dtype, keeps):
    check(case, bounds, dtype, keeps, CPU)


@pytest.mark.parametrize("change", ["channels_last", "transposed", "expanded gradient", "strided"])
def test_memory_layouts(change):
    x, grad, step, _ = setting((4, 6, 5, 5), (4, 1, 1, 1), torch.float32)
    expected = fused(x, grad, step)
    if change == "channels_last":
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    elif change == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif change == "strided":
        x = torch.stack([x, x], -1)[..., 0]
        assert Places.of(x, step) is None
    else:
        grad = torch.ones(()).expand(x.shape)
        expected = fused(x, grad.contiguous(), step)
    for one, other in zip(fused(x, grad, step), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def fused(x, grad, step, **options):
    """Value and gradients by way of the public function."""
    leaves = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), step.log2().requires_grad_()
    y = fake_quantize(*leaves, -4.0, 3.0, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def test_what_overflows_or_is_no_number_stays_seen():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    found = kernels.rounded(x, torch.tensor(0.5), -4.0, 3.0, 0.0, None)
    assert found[0].isnan()
    assert found[1:].tolist() == [1.5, -2.0, 1.5, -2.0]


def test_sums_over_gradients_are_left_to_the_operations():
    x, grad, step, _ = setting((3, 40), (3, 1), torch.float32)
    assert kernels.fused_gradients(grad, x, 0.0, Sums(step, -4.0, 3.0, False, AdaptiveEWGS()), None) is None
    assert kernels.fused_gradients(grad, x, 0.0, Sums(step, -4.0, 3.0, False, LSQ()), None) is not None


@pytest.mark.parametrize("x", [torch.zeros(3, dtype=torch.float64), torch.zeros(0), torch.zeros(6)[::2]])
def test_tensors_that_are_left_to_the_operations(x):
    assert kernels.fused_places(x, torch.ones(()), (-1.0, 1.0, 0.0), None) is None
    assert kernels.fused_places(torch.zeros(3), torch.ones(()), (-1.0, 1.0, 0.0), None) == Places(1, 1, 3)


def test_runs_repeat_exactly():
    x, grad, step, _ = setting((10, 19, 7, 7), (), torch.float32)
    assert all(torch.equal(*pair) for pair in zip(fused(x, grad, step), fused(x, grad, step), strict=True))


def test_many_programs_share_the_work(monkeypatch):
    """Each program works on several tiles where there are more tiles than programs."""
    x, grad, step, _ = setting((5, 9000), (5, 1), torch.float32)
    expected = fused(x, grad, step)
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 10)
    for one, other in zip(fused(x, grad, step), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- before the first use ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["raises", "differs"])
def test_kernels_that_fail_are_not_used(trouble, monkeypatch):
    def failing(x, *_):
        if trouble == "raises":
            raise RuntimeError("Failed to find C compiler")
        return x

    monkeypatch.setattr(triton_kernels, "round_values", failing)
    monkeypatch.setattr(kernels, "_PROVEN", {})
    said = {"raises": "RuntimeError: Failed to find C compiler", "differs": "they give other values than"}
    with pytest.warns(match=f"the fused kernels of lq are not used on cpu: {said[trouble]}.*LQ_TRITON=0"):
        found = kernels.rounded(torch.tensor([0.4]), torch.tensor(0.5), -4.0, 3.0, 0.0, None)
    assert found.tolist() == [0.5]
    kernels.rounded(torch.tensor([0.4]), torch.tensor(0.5), -4.0, 3.0, 0.0, None)  # said once


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(kernels, "_PROVEN", {})
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert not kernels.proven(CPU)
