"""Activation checkpointing: what runs again in backward is quantized as it was in the forward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lq
from lq.attachment.sites import quantizers
from lq.structure.recomputation import without_recomputation

VARIANTS = {"reentrant": True, "not reentrant": False}
both = pytest.mark.parametrize("reentrant", VARIANTS.values(), ids=VARIANTS)


class Attention(nn.Module):
    """Attention whose products are in a method or in a function within the forward; each may be checkpointed."""

    def __init__(self, kind="method"):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.kind, self.reentrant = kind, None
        self.runs = 0

    def attend(self, q, k, v):
        self.runs += 1
        return (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v

    def twice(self, q, k, v):
        return self.attend(q, k, self.maybe(self.attend, q, k, v))

    def maybe(self, function, *args):
        if self.reentrant is None:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.kind == "method":
            y = self.maybe(self.attend, q, k, v)
        elif self.kind == "after another product":
            y = self.maybe(self.attend, q, k, (q @ q.transpose(-1, -2)) @ v)
        elif self.kind == "function":
            y = self.maybe(lambda one, two, three: self.attend(one, two, three).clone(), q, k, v)
        else:
            y = self.maybe(self.twice, q, k, v)
        return self.proj(y)


def attached(kind, estimator="lsq"):
    torch.manual_seed(0)
    net, x = Attention(kind), torch.randn(4, 6, 8)
    lq.attach(net, 4, 3, structure=lq.inspect(net, x), first_last=None, estimator=estimator)
    return lq.calibrate(net, [x]).train(), x


def gradients(net, x):
    net.zero_grad()
    net(x).square().mean().backward()
    return [p.grad.clone() for p in net.parameters()]


@both
@pytest.mark.parametrize("kind", ["method", "after another product", "function", "nested"])
def test_gradients_are_those_without_checkpointing(kind, reentrant):
    net, x = attached(kind)
    expected = gradients(net, x)
    net.reentrant, net.runs = reentrant, 0
    found = gradients(net, x)
    assert net.runs >= 2, "nothing was recomputed"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, x), found, strict=True))


@both
def test_one_function_in_checkpointed_and_other_segments(reentrant):
    """The last segment of `checkpoint_sequential` is not checkpointed: its calls stand where those of the others do."""

    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing, self.segments = nn.Parameter(torch.randn(8, 8) / 3), 1
            self.head = nn.Linear(8, 3)

        def part(self, x):
            return torch.tanh(x @ self.mixing)

        def forward(self, x):
            parts = [self.part] * 4
            return self.head(checkpoint_sequential(parts, self.segments, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    net, x = Segments(), torch.randn(4, 8)
    lq.attach(net, 4, 3, structure=lq.inspect(net, x), first_last=None, estimator="lsq")
    lq.calibrate(net, [x]).train()
    expected = gradients(net, x.requires_grad_())
    net.segments = 2
    for a, b in zip(gradients(net, x), expected, strict=True):
        torch.testing.assert_close(a, b)


@both
def test_a_checkpointed_module(reentrant):
    net, x = attached("method")
    expected = gradients(net, x)
    outer = nn.Sequential(nn.Identity(), net)
    net.zero_grad()
    checkpoint(outer, x.requires_grad_(), use_reentrant=reentrant).square().mean().backward()
    for parameter, other in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, other)


@both
def test_checkpointing_in_several_threads(reentrant):
    nets = [attached("method") for _ in range(3)]
    expected = [gradients(*pair) for pair in nets]
    for net, _ in nets:
        net.reentrant = reentrant
    with ThreadPoolExecutor(3) as pool:
        for found, other in zip(pool.map(lambda pair: gradients(*pair), nets), expected, strict=True):
            for a, b in zip(found, other, strict=True):
                torch.testing.assert_close(a, b)


def test_backward_within_a_forward():
    """A forward that takes gradients itself, through a checkpointed part."""

    class Energy(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            y = self.maybe(self.attend, q, k, v)
            (slope,) = torch.autograd.grad(y.sum(), v, retain_graph=True)
            return self.proj(y + slope)

    torch.manual_seed(0)
    net, x = Energy(), torch.randn(4, 6, 8)
    with torch.enable_grad():
        structure = lq.inspect(net, x, forward=with_gradients)
    lq.attach(net, 4, 3, structure=structure, first_last=None)
    lq.calibrate(net, [x], forward=with_gradients).train()
    expected = gradients(net, x)
    net.reentrant = False
    for a, b in zip(gradients(net, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def with_gradients(model, batch):
    with torch.enable_grad():
        return model(batch)


@both
def test_checkpointing_can_be_left_out(reentrant):
    net, x = attached("method")
    expected = gradients(net, x)
    net.reentrant, net.runs = reentrant, 0
    with without_recomputation():
        found = gradients(net, x)
    assert net.runs == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    net.runs = 0
    gradients(net, x)
    assert net.runs == 2, "it is back"


def test_other_threads_go_on_checkpointing():
    net, x = attached("method")
    net.reentrant, net.runs = False, 0
    with without_recomputation(), ThreadPoolExecutor(1) as pool:
        pool.submit(gradients, net, x).result()
    assert net.runs == 2


@both
def test_models_without_quantizers_checkpoint_as_before(reentrant):
    torch.manual_seed(0)
    net, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    checkpoint_sequential(net, 2, x, use_reentrant=reentrant).sum().backward()
    for parameter, other in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, other)
    assert not any(True for _ in quantizers(net))
