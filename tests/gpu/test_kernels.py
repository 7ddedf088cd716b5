"""The fused kernels, compiled and run: they are used, give what operations of torch give, and nothing waits."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.quantizer import kernels
from lq.quantizer.estimators import ESTIMATORS, NoiseScale
from tests.gpu.device import DEVICE, needs_gpu
from tests.quantizer.fused import GRIDS, SHAPES, check

pytestmark = needs_gpu
on_gpu_alone = pytest.mark.skipif(DEVICE.type == "cpu", reason="of kernels on a GPU")


@on_gpu_alone
def test_kernels_are_used_without_a_warning(monkeypatch):
    """They compare themselves with operations before the first use."""
    monkeypatch.setattr(kernels, "_PROVEN", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.proven(torch.zeros(1, device=DEVICE).device)


@on_gpu_alone
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", GRIDS)
@pytest.mark.parametrize("case", SHAPES)
def test_values_and_gradients_are_those_of_the_operations(case, bounds, dtype, keeps):
    check(case, bounds, dtype, keeps, torch.zeros(1, device=DEVICE).device)


@on_gpu_alone
def test_large_tensors():
    """More tiles than programs, and more values than 32-bit floats count."""
    x = torch.randn(64, 64, 112, 112, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    log2_step = torch.tensor(-2.0, device=DEVICE, requires_grad=True)
    found = []
    for uses in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not uses:
                patch.setattr(kernels, "on_gpu", lambda _: False)
            y = lq.quantizer.functional.fake_quantize(x, log2_step, -8.0, 7.0)
            found.append([y.detach(), *torch.autograd.grad(y, [x, log2_step], torch.ones_like(y))])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1.0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


@contextlib.contextmanager
def waiting_is_an_error():
    if DEVICE.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "learned widths"])
def test_steps_of_training_do_not_wait(estimator):
    chosen = NoiseScale(widths=True) if estimator == "learned widths" else estimator
    net = lq.attach(network(), 4, 4, estimator=chosen)
    lq.calibrate(net, [torch.randn(8, 3, 8, 8)])
    net.to(DEVICE).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x, y = torch.randn(8, 3, 8, 8, device=DEVICE), torch.zeros(8, dtype=torch.long, device=DEVICE)
    F.cross_entropy(net(x), y).backward()  # libraries are loaded, kernels compiled
    with waiting_is_an_error():
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("estimator", ["ste", "lsq", "ewgs"])
def test_gradients_are_those_of_the_cpu(estimator):
    found = []
    for device in ("cpu", DEVICE):
        net = lq.attach(network(), 4, 4, estimator=estimator)
        lq.calibrate(net, [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
        net.to(device)
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)
        net(x).square().mean().backward()
        found.append({name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():  # single values may be rounded to the neighbouring level
        error = torch.linalg.vector_norm(found[1][name] - expected) / torch.linalg.vector_norm(expected)
        assert error < 0.05, name


@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores.*")
def test_compiled_networks_are_one_graph():
    torch._dynamo.reset()
    net = lq.attach(network(), 4, 4, estimator="lsq")
    lq.calibrate(net, [torch.randn(8, 3, 8, 8)])
    net.to(DEVICE).train()
    x = torch.randn(8, 3, 8, 8, device=DEVICE)
    found = []
    for run in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        run(x).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for eager, compiled in zip(*found, strict=True):
        error = torch.linalg.vector_norm(compiled - eager) / torch.linalg.vector_norm(eager).clamp(min=1e-6)
        assert error < 0.05
