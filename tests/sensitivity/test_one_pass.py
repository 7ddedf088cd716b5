"""The one pass against single samples, whose gradients autograd finds for each weight and activation as a leaf."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.float_models import float_model
from lq.attachment.sites import quantizers
from lq.errors import StateError
from lq.sensitivity.metrics import signs
from lq.sensitivity.one_pass import OnePass
from lq.sensitivity.tensors import find_tensors
from lq.structure.samples import take
from tests.models import Attention, every_model, example

WIDTHS = (0, 1, 2, 4, 8)


def prepared(model, x, skip=True):
    structure = lq.inspect(model, x)
    lq.attach(model, 4, 4, structure=structure, skip=skip, first_last=None)
    lq.calibrate(model, [x])
    return model.double()


def direction(output):
    return torch.cos(torch.arange(output[0].numel(), dtype=torch.double)).view_as(output[0])


def objective(model, x):
    output = model(x)
    return (output.square() * direction(output)).sum()


def by_leaves(model, items, x):
    """Terms of one sample: each tensor that a quantizer is given becomes a leaf, autograd adds up all its uses."""
    leaves = {}
    with float_model(model), torch.enable_grad():
        for item in items:

            def tap(value, item=item):
                leaf = torch.zeros_like(value, requires_grad=True)
                leaves.setdefault(id(item), []).append((value.detach().clone(), leaf))
                return value + leaf

            item.quantizer.tap = tap
        objective(model, x).backward()
    found = []
    for item in items:
        total = torch.zeros(item.channels, len(WIDTHS), dtype=torch.double)
        for value, leaf in leaves.get(id(item), []):
            for column, width in enumerate(WIDTHS):
                product = (item.rounded(value, width) - value) * leaf.grad
                rows = item.layout.rows(product) if item.channels > 1 else product.reshape(1, -1)
                total[:, column] += rows.sum(1)
        found.append(total)
    return found


def check(model, x):
    items = find_tensors(model, WIDTHS)
    one_pass = OnePass(model, items, objective)
    found = one_pass.measure(x)
    for n in range(len(x)):
        expected = by_leaves(model, items, x[n : n + 1])
        for item, terms, wanted in zip(items, found, expected, strict=True):
            scale = wanted.abs().max()
            assert (terms[n] - wanted).abs().max() <= 1e-9 * scale, item.name
    return one_pass


def floats(x):
    return x.double() if x.is_floating_point() else x


@every_model
def test_one_pass_is_the_gradients_of_single_samples(kind):
    model, x = example(kind)
    model = prepared(model, x)
    one_pass = check(model, floats(x))
    single = {"text", "odd weights"}  # an LSTM; an einsum, a standardized weight
    assert bool(one_pass.single) == (kind in single)


class Shared(nn.Module):
    """A layer called twice, a weight that two layers share, and one that the forward uses by itself."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 4)
        self.other.weight = self.one.weight
        self.by_hand = nn.Linear(4, 2)

    def forward(self, x):
        x = self.twice(F.relu(self.twice(x))).mean((2, 3))
        x = torch.tanh(self.one(x)) * self.other(x)
        return F.linear(x, self.by_hand.weight, self.by_hand.bias)


def test_shared_weights_and_layers_called_twice():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    one_pass = check(prepared(Shared(), x), x.double())
    assert not one_pass.single


class TimeMajor(nn.Module):
    """Samples along the second dimension inside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(F.relu(self.first(x.transpose(0, 1)))).transpose(0, 1)


def test_time_major_layers_inside():
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5)  # 8 steps divide by 4 samples: no shape gives it away
    assert not check(prepared(TimeMajor(), x, skip=False), x.double()).single


def test_samples_that_lie_otherwise_go_one_at_a_time():
    class Woven(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):  # rows of the layer: (step, sample, step)
            return self.layer(x.unflatten(1, (2, 4)).transpose(0, 1).flatten(0, 2)).view(2, -1, 12).transpose(0, 1)

    torch.manual_seed(0)
    x = torch.randn(4, 8, 5)
    one_pass = check(lq.attach(Woven(), 4, first_last=None).double(), x.double())
    assert one_pass.single == "samples are not apart along a dimension at layer.weight"


def test_torch_multi_head_attention_without_a_structure():
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    model, x = Heads().eval(), torch.randn(3, 4, 8)
    lq.attach(model, 4, first_last=None)
    one_pass = check(model.double(), x.double())
    assert not one_pass.single


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = prepared(Attention(), x).train()
    model.proj.bias.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    OnePass(model, find_tensors(model, WIDTHS), objective).measure(x.double())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(q.tap is None for q in quantizers(model))
    assert all(module.training for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert p.grad is None
        assert torch.equal(p, before[name][1])


def test_tensors_that_change_after_their_use_are_an_error():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            return x.mul_(2.0) + y

    x = torch.randn(3, 4)
    model = lq.attach(Overwrites(), 4, first_last=None)
    with pytest.raises(StateError, match=r"second.weight is changed in place after it was used"):
        OnePass(model, find_tensors(model, WIDTHS), lambda model, x: model(x).sum()).measure(x)


def test_an_output_that_depends_on_nothing_is_an_error():
    model = lq.attach(nn.Sequential(nn.Linear(4, 4)), 4)
    with pytest.raises(StateError, match="does not depend on a quantized layer"):
        OnePass(model, find_tensors(model, WIDTHS), lambda model, x: model(x).detach().sum()).measure(torch.randn(2, 4))


def test_random_signs_of_a_batch_are_those_of_its_samples():
    torch.manual_seed(3)
    together = signs(torch.zeros(2, 1001))
    torch.manual_seed(3)
    apart = torch.cat([signs(torch.zeros(1, 1001)) for _ in range(2)])
    assert torch.equal(together, apart)
    assert together.unique().tolist() == [-1.0, 1.0]


def test_take_keeps_what_is_not_of_the_batch():
    batch = {"x": torch.arange(6).view(3, 2), "mask": torch.ones(2), "names": ["a", "b"]}
    part = take(batch, 1, 2)
    assert part["x"].tolist() == [[2, 3]]
    assert part["mask"].shape == (2,)
