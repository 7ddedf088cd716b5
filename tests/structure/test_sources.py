"""Where the weights of calls are kept, against the tensors that the calls get."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.stored import call_weights
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout
from lq.structure.sources import Parameters, Source, known_sources
from lq.structure.structure import Structure
from tests.models import example


def source_of(parameter, operand, dim=0):
    return Source.of("w", parameter, operand, ChannelLayout(operand.shape[dim], dim))


VIEWS = {
    "whole": lambda w: w,
    "transposed": lambda w: w.t(),
    "rows": lambda w: w[2:5],
    "columns": lambda w: w[:, 1:4],
    "one of three": lambda w: w.chunk(3)[1],
    "reshaped": lambda w: w.view(3, 2, 8),
    "every second": lambda w: w[::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("shift", [0, 5])
def test_views_are_found_again_in_other_tensors(view, shift):
    """In a parameter of other values, also one that is a part of a larger memory."""
    memory = torch.randn(48 + shift)
    parameter = nn.Parameter(memory[shift:].view(6, 8))
    source = source_of(parameter, view(parameter))
    other = torch.randn(6, 8)
    assert torch.equal(source.view(other), view(other)) and source.fits(other)
    source.view(other).zero_()
    assert not view(other).any() and int((other == 0).sum()) == view(other).numel()
    assert torch.equal(source.view(parameter.detach()), view(parameter))


def test_parameters_in_another_memory_format():
    parameter = nn.Parameter(torch.randn(4, 3, 5, 5))
    source = source_of(parameter, parameter)
    turned = parameter.detach().to(memory_format=torch.channels_last)
    assert torch.equal(source.view(turned), parameter)
    part = source_of(parameter, parameter[1:3])
    assert torch.equal(part.view(turned), parameter[1:3])
    assert source_of(nn.Parameter(turned), turned[1:3]) is None  # strides of another format say nothing


def test_parameters_are_found_by_their_memory():
    flat = torch.zeros(40)
    first, second = nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[20:].view(4, 5))
    found = Parameters([("first", first), ("second", second)])
    assert [found.find(t)[0] for t in (first, second, first.t(), second[2:])] == ["first", "second", "first", "second"]
    assert found.find(first.clone()) is None and found.find(flat) is None and found.find(first * 1) is None
    assert found.find(torch.zeros(0)) is None and found.find(torch.zeros(2, device="meta")) is None


class Calls(nn.Module):
    """Weights as functions get them: whole, transposed, in parts, from below, computed, and read by others too."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Parameter(torch.randn(6, 6))
        self.turned = nn.Parameter(torch.randn(6, 6))
        self.parts = nn.Parameter(torch.randn(12, 6))
        self.upper = nn.Parameter(torch.randn(12, 6))
        self.below = nn.Module()
        self.below.matrix = nn.Parameter(torch.randn(6, 6))
        self.scaled = nn.Parameter(torch.randn(6, 6))
        self.read = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = F.linear(x, self.whole)
        x = x @ self.turned.T
        first, second = self.parts.chunk(2)
        x = F.linear(F.linear(x, first), second)
        x = F.linear(x, self.upper[:6])
        x = torch.einsum("bi,ij->bj", x, self.below.matrix)
        x = F.linear(x, self.scaled * 2)
        return F.linear(x, self.read) + self.read.clone().sum()


def calls(seed=0, **options):
    torch.manual_seed(seed)
    model, x = Calls().eval(), torch.randn(5, 6)
    lq.attach(model, 4, 8, structure=lq.inspect(model, x), first_last=None, **options)
    return lq.calibrate(model, [x]).eval(), x


def test_what_calls_multiply_by_is_where_sources_say():
    model, x = calls()
    seen = {}
    for weight in call_weights(model):
        weight.quantizer.tap = lambda w, name=weight.place: seen.setdefault(name, w.detach().clone())
    model(x)
    known = {w.place: w for w in call_weights(model) if w.source is not None}
    assert {w.key for w in known.values()} == {"whole", "turned", "parts", "upper", "below.matrix", "read"}
    for place, weight in known.items():
        assert torch.equal(weight.weight, seen[place])
    assert len(seen) == len(known) + 1  # the scaled one


def test_reasons_why_parameters_stay_float():
    reasons = {w.key or w.place: w.reason for w in call_weights(calls()[0])}
    assert [key for key, reason in reasons.items() if not reason] == ["whole", "turned", "parts", "below.matrix"]
    assert reasons["upper"] == "only parts of upper are quantized"
    assert reasons["read"] == "read is used in float as well"
    assert "no parameter as it is" in reasons["linear_4_weight"]


def test_parameters_that_a_call_without_quantizer_reads_stay_float():
    model, _ = calls(exclude="linear_1")
    assert {w.key: w.reason for w in call_weights(model)}["parts"] == "parts is used in float as well"


def test_sources_survive_json_and_prefixes():
    torch.manual_seed(0)
    structure = lq.inspect(Calls().eval(), torch.randn(5, 6))
    assert Structure.from_json(json.dumps(structure.to_dict())) == structure
    names = {site.source.parameter for site in structure.under("net").sites if site.source}
    assert "net.whole" in names and "net.below.matrix" in names
    outer = nn.ModuleDict({"net": Calls().eval()})
    lq.attach(outer, 4, structure=structure.under("net"))
    assert {w.key for w in call_weights(outer) if not w.reason} >= {"net.whole", "net.below.matrix"}


class Experts(nn.Module):
    """The data say which expert a call multiplies by."""

    def __init__(self, stacked):
        super().__init__()
        single = [nn.Parameter(torch.randn(6, 6)) for _ in range(3)]
        self.experts = nn.Parameter(torch.stack([p.detach() for p in single])) if stacked else nn.ParameterList(single)

    def forward(self, x):
        return F.linear(x, self.experts[int(x[0, 0])])


@pytest.mark.parametrize("stacked", [True, False])
def test_another_parameter_at_each_call_has_no_source(stacked, tmp_path):
    torch.manual_seed(0)
    model, first, second = Experts(stacked).eval(), torch.zeros(2, 6), torch.ones(2, 6)
    lq.attach(model, 4, structure=lq.inspect(model, first), first_last=None)
    model(first)
    quantizer = next(m for m in model.modules() if isinstance(m, WeightQuantizer))
    assert quantizer.source is not None
    model(second)
    assert quantizer.source is None
    with pytest.warns(UserWarning, match="1 weights of functions are stored in float: linear_0_weight"):
        lq.save(model, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", Experts(stacked).eval())
    for x in (first, second):
        assert torch.equal(loaded(x), model(x))


RECURRENT = {
    "lstm": lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
    "without biases": lambda: nn.GRU(6, 5, 2, bias=False),
    "projected": lambda: nn.LSTM(6, 5, proj_size=3, batch_first=True),
    "tanh": lambda: nn.RNN(6, 5),
    "lstm cell": lambda: nn.LSTMCell(6, 5),
    "gru cell": lambda: nn.GRUCell(6, 5),
    "relu cell": lambda: nn.RNNCell(6, 5, nonlinearity="relu"),
}


class Attention(nn.Module):
    """torch's attention by one, two or three different inputs; `other`: keys and values of other sizes."""

    def __init__(self, inputs, other=False):
        super().__init__()
        sizes = {"kdim": 4, "vdim": 3} if other else {}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.inputs, self.other = inputs, other

    def forward(self, x):
        key, value = (x[..., :4], x[..., :3]) if self.other else (x, x)
        if self.inputs > 1 and not self.other:
            key = value = x * 2
        return self.attention(x, key, value * 3 if self.inputs > 2 else value)[0]


KNOWN = {
    **{name: (make, (4, 6) if "cell" in name else (4, 3, 6)) for name, make in RECURRENT.items()},
    **{f"{n} inputs": (lambda n=n: Attention(n), (4, 3, 8)) for n in (1, 2, 3)},
    "other sizes": (lambda: Attention(3, True), (4, 3, 8)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("per_channel", [True, False])
def test_torchs_own_modules_are_known_without_a_run(kind, per_channel):
    """As a run shows them."""
    torch.manual_seed(0)
    build, shape = KNOWN[kind]
    model, x = build().eval(), torch.randn(shape)
    lq.attach(model, lq.QuantSpec(4, per_channel=per_channel), structure=lq.inspect(model, x), first_last=None)
    module = next(m for m in model.modules() if "call_quantizers" in m._modules)
    seen = {q: m.source for q, m in module.call_quantizers._modules.items() if isinstance(m, WeightQuantizer)}
    known = dict(known_sources(module, seen))
    assert seen and known.keys() == seen.keys()
    for slot, source in seen.items():
        values = source.view(source.within(module))
        assert torch.equal(known[slot].view(known[slot].within(module)), values)
        assert (known[slot].layout, known[slot].shape) == (source.layout, source.shape)


def test_models_from_checkpoints_know_them_too():
    for kind in ("text", "encoder"):
        model, x = example(kind)
        lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x])
        loaded = lq.load(model.state_dict(), example(kind)[0])
        mine, theirs = call_weights(model), call_weights(loaded)
        assert mine and [(w.name, w.key, w.reason) for w in mine] == [(w.name, w.key, w.reason) for w in theirs]
