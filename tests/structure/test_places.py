"""Calls are told by their place in the code: other branches, longer loops, both ways to compute attention."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.interception import call_quantizers
from lq.structure.places import CallOrder, Places, call_of

pytestmark = pytest.mark.filterwarnings("error")


class Branches(nn.Module):
    """A product on one of two branches, and one that always comes after it."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.both = True

    def forward(self, x):
        x = self.embed(x)
        if self.both:
            x = (x @ x.transpose(-1, -2)).softmax(-1) @ x
        return self.head(10 * x @ (x.transpose(-1, -2) @ x))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.times = nn.Linear(8, 8), nn.Linear(8, 4), 2

    def mixed(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(self.times):
            x = self.mixed(x) @ x
        return self.head(x.transpose(-1, -2) @ x)


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(8, 24), nn.Linear(8, 4), True

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.proj(F.scaled_dot_product_attention(q, k, v))
        return self.proj((q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v)


def x():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def attached(kind, **state):
    torch.manual_seed(0)
    net = kind().eval()
    net.__dict__.update(state)
    lq.attach(net, 8, 3, structure=lq.inspect(net, x()), first_last=None)
    return lq.calibrate(net, [x()])


class Rounded:
    """Names of the call quantizers that a run reaches, in order."""

    def __init__(self, net):
        self.names = []
        for name, quantizer in call_quantizers(net).items():
            quantizer.register_forward_hook(lambda *_, name=name: self.names.append(name))


def test_another_branch_has_the_quantizers_of_its_calls():
    net = attached(Branches)
    seen = Rounded(net)
    net(x())
    assert len(seen.names) == 8
    seen.names.clear()
    net.both = False
    net(x())
    assert {call_of(name) for name in seen.names} == {"matmul_2", "matmul_3"}


def test_a_branch_that_was_not_seen_stays_float_and_is_told_once():
    net = attached(Branches, both=False)
    expected = net(x())
    seen = Rounded(net)
    net.both = True
    with pytest.warns(UserWarning, match=r"Branches calls matmul in forward \(line \d+ of its file\).* stays float"):
        net(x())
    assert {call_of(name) for name in seen.names} == {"matmul_0", "matmul_1"}, "of those that always come"
    net(x())  # told once
    net.both = False
    assert torch.equal(net(x()), expected)


def test_a_loop_that_is_longer_than_the_example():
    net = attached(Loop)
    seen = Rounded(net)
    net(x())
    usual = list(seen.names)
    seen.names.clear()
    net.times = 3
    with pytest.warns(UserWarning, match="a longer loop"):
        net(x())
    assert seen.names == usual
    seen.names.clear()
    net.times = 1
    net(x())
    assert {call_of(name) for name in seen.names} == {"matmul_0", "matmul_1", "matmul_4"}


@pytest.mark.parametrize("fused", [True, False])
def test_the_other_way_to_compute_attention(fused):
    net = attached(Attend, fused=fused)
    expected = net(x())
    net.fused = not fused
    torch.testing.assert_close(net(x()), expected)


def test_places_are_learned_where_only_names_are_known():
    net = attached(Branches)
    loaded = lq.load(net.state_dict(), Branches().eval())
    assert loaded.call_quantizers.places is None
    assert torch.equal(loaded(x()), net(x()))
    loaded.both = net.both = False
    assert torch.equal(loaded(x()), net(x()))
    copied = copy.deepcopy(net)
    assert torch.equal(copied(x()), net(x()))


def test_a_saved_structure_knows_names_alone():
    net = Branches().eval()
    structure = lq.inspect(net, x())
    restored = lq.Structure.from_json(structure.to_json())
    assert restored == structure and not restored.places and structure.places


def test_modules_that_are_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Branches()

        def forward(self, x):
            first = self.inner(x)
            self.inner.both = not self.inner.both
            second = self.inner(x)
            self.inner.both = not self.inner.both
            return first + second

    torch.manual_seed(0)
    net = Twice().eval()
    lq.attach(net, 8, 3, structure=lq.inspect(net, x()), first_last=None)
    lq.calibrate(net, [x()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x())


def test_the_same_instruction_reached_another_way():
    """A method that is checkpointed in training is called from another line; one that both lines call is ambiguous."""
    places = Places()
    places.add_run([("matmul", 0, "attend@4<forward@10"), ("matmul", 1, "attend@4<forward@20")])
    order = CallOrder(places)
    assert [order.next("matmul", f"attend@4<forward@{at}") for at in (12, 22)] == [0, 1]
    assert CallOrder(places).next("matmul", "attend@8<forward@10") is None
    order = CallOrder(places)
    assert [order.next("matmul", f"attend@4<forward@{at}") for at in (12, 10, 20)] == [0, 0, 1]
    order = CallOrder(places)
    assert [order.next("matmul", f"attend@4<forward@{at}") for at in (12, 10, 20)] == [None, 0, 1]


def test_numbers_of_a_run():
    places = Places()
    places.add_run([("matmul", 0, "a"), ("matmul", 1, "b"), ("matmul", 2, "a"), ("add", 0, "c")])
    order = CallOrder(places)
    assert [order.next("matmul", place) for place in "baab"] == [1, 0, 2, None]
    assert order.next("matmul", "elsewhere") is None
    assert order.next("add", "c") == 0
    again = CallOrder(places).copy()
    assert again.next("matmul", "a") == 0
