"""One parameter in several places: one grid."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.interception import call_quantizers
from lq.attachment.sites import quantizers, weight_quantizer


class Embedding(nn.Module):
    """A decoder that uses the embedding's weight, as a layer or in a function."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.decode = nn.Linear(8, 11, bias=False) if layer else None
        if layer:
            self.decode.weight = self.embed.weight

    def forward(self, x):
        x = self.mix(self.embed(x))
        return F.linear(x, self.embed.weight) if self.decode is None else self.decode(x)


class Twice(nn.Module):
    """A parameter that two calls multiply by."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.w)), self.w)


class Apart(nn.Module):
    """Two modules that share a parameter, which each multiplies by in a function."""

    class Part(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = w

        def forward(self, x):
            return F.linear(x, self.w)

    def __init__(self):
        super().__init__()
        w = nn.Parameter(torch.randn(6, 6))
        self.one, self.two = self.Part(w), self.Part(w)

    def forward(self, x):
        return self.two(self.one(x).relu())


def tokens():
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("structure", [True, False])
@pytest.mark.parametrize("first_last", [8, None])
def test_tied_layers_have_one_quantizer_of_the_widest_spec(first_last, structure):
    torch.manual_seed(0)
    model, x = Embedding(layer=True), tokens()
    found = lq.inspect(model, x) if structure else None
    lq.attach(model, 4, None, structure=found, first_last=first_last, overrides={"embed": {"weights": 2}})
    assert weight_quantizer(model.embed) is weight_quantizer(model.decode)
    assert weight_quantizer(model.embed).bits.unique().tolist() == [8 if first_last else 4]
    assert torch.equal(model.embed.weight, model.decode.weight)


def test_a_function_of_a_layers_weight_sees_its_grid():
    torch.manual_seed(0)
    model, x = Embedding(layer=False), tokens()
    lq.calibrate(lq.attach(model, 3, None, structure=lq.inspect(model, x), first_last=None), [x])
    assert [q.name for q in quantizers(model)] == ["embed.weight", "mix.weight"]


@pytest.mark.parametrize("kind", [Twice, Apart])
def test_two_calls_learn_one_grid(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 6)
    structure = lq.inspect(model, x)
    lq.attach(model, 3, None, structure=structure, first_last=None, estimator="lsq")
    lq.calibrate(model, [x])
    assert len(list(quantizers(model))) == 1
    places = [name for part in model.modules() for name in call_quantizers(part)]
    assert places == (["linear_0_weight", "linear_1_weight"] if kind is Twice else ["linear_0_weight"] * 2)
    (quantizer,) = quantizers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2
    model.train()(x).square().sum().backward()
    assert quantizer.log2_step.grad.abs().sum() > 0
    state = model.state_dict()
    assert sum(key.endswith("log2_step") for key in state) == 2
    loaded = lq.load(state, kind())
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    lq.set_bits(model, {"*": 2})
    assert quantizer.bits.unique().tolist() == [2]


@pytest.mark.parametrize("kind", [Twice, Apart])
def test_one_weight_is_packed_once(kind, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(5, 6)
    lq.calibrate(lq.attach(model, 4, None, structure=lq.inspect(model, x), first_last=None), [x])
    lq.save(model, tmp_path / "model.safetensors")
    loaded = lq.load(tmp_path / "model.safetensors", kind().eval())
    assert torch.equal(loaded(x), model(x))
    found = lq.summary(model)
    assert sum(layer.bytes for layer in found.layers) < 6 * 6 / 2 + 6 * 4 * 2 + 20
