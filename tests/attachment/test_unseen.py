"""Layers that a dry run did not reach: which are the network's, which are left, and that those say so."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers, weight_quantizer
from lq.errors import NoEffectWarning
from lq.structure.structure import Structure


def block():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Part(nn.Module):
    """Experts in a list, an early exit, a head for training, one of two branches."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(block() for _ in range(4))
        self.exit = block()
        self.aux = nn.Sequential(nn.Linear(8, 2))
        self.head = nn.Linear(8, 2)

    def forward(self, x, early=False):
        if early:
            return self.exit(x)
        x = self.experts[0](self.gate(x).repeat(1, 2))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Whole(nn.Module):
    """A network, and what is held beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Part()
        self.teacher = copy.deepcopy(self.net)
        self.pair = nn.ModuleDict({"student": block(), "average": block()})
        self.exits = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.late = nn.Linear(2, 2)

    def forward(self, x, teach=False):
        y = self.net(self.pair["student"](x))
        return (y, self.teacher(x)) if teach else y


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
OF_NET = {
    "net.gate", "net.head", "net.exit.0", "net.exit.2", "net.aux.0",
    *(f"net.experts.{i}.{j}" for i in range(4) for j in (0, 2)),
}  # fmt: skip
OWN = OF_NET | {"pair.student.0", "pair.student.2", "exits.0", "exits.1", "late"}
ASIDE = {"pair.average.0", "pair.average.2", *(name.replace("net", "teacher") for name in OF_NET)}


def weights(model):
    return {name for name, module in model.named_modules() if weight_quantizer(module) is not None}


def attached(**options):
    model = Whole().eval()
    structure = lq.inspect(model, X)
    return lq.attach(model, 4, 8, structure=structure, **options), structure


def test_the_networks_own_layers_are_quantized_and_a_teacher_is_not():
    model, _ = attached()
    assert weights(model) == OWN
    inputs = {q.name for q in quantizers(model) if q.name.endswith("input")}
    assert inputs == {f"{name}.input" for name in OWN} - {"pair.student.0.input"}
    assert weight_quantizer(model.net.experts[3][0]).bits.unique().tolist() == [4.0]


def test_by_class_is_as_without_a_structure():
    """Widths, channels and rules are those of the same layer in a model that was not looked at."""
    with_structure, _ = attached(first_last=None)
    by_class = lq.attach(Whole(), 4, 8, first_last=None)
    for name in ("net.experts.2.0", "net.aux.0", "late"):
        mine, other = (weight_quantizer(m.get_submodule(name)) for m in (with_structure, by_class))
        assert mine.spec == other.spec
        assert torch.equal(mine.log2_step, other.log2_step)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": "net.experts"}, {n for n in OWN if "experts" not in n}),
        ({"exclude": ["net.experts.2", "late"]}, OWN - {"net.experts.2.0", "net.experts.2.2", "late"}),
        ({"include": ["net.experts.1", "net.head"]}, {"net.experts.1.0", "net.experts.1.2", "net.head"}),
        ({"include": ["teacher.head", "net.head"]}, {"teacher.head", "net.head"}),
        ({"overrides": {"teacher.head": {"weights": 2}}}, OWN | {"teacher.head"}),
        ({"overrides": {"*.head": {"weights": 2}}}, OWN),
        ({"overrides": {"net.exit": {"weights": None, "activations": None}}}, OWN - {"net.exit.0", "net.exit.2"}),
    ],
)
def test_patterns(options, expected):
    assert weights(attached(**options)[0]) == expected


def test_what_was_left_says_so_when_it_runs_once():
    model, _ = attached()
    with pytest.warns(NoEffectWarning, match="never seen"):
        lq.calibrate(model, [X])
    message = r"a Linear runs in float: .*no quantizers: (teacher|pair).* and \d+ more"
    with pytest.warns(NoEffectWarning, match=message):
        model(X, teach=True)
    model(X, teach=True)  # warnings are errors
    lq.detach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_was_excluded_is_silent():
    model, _ = attached(exclude=["teacher", "pair.average"])
    with pytest.warns(NoEffectWarning, match="never seen"):
        lq.calibrate(model, [X])
    model(X, teach=True)  # warnings are errors


def test_layers_that_the_run_saw_are_not_added():
    """Weights that functions use, computed first, or shared with a layer that ran."""

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.turned, self.computed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied, self.owner = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.owner.weight
            self.constant = nn.Embedding(4, 8)

        def forward(self, x):
            x = nn.functional.linear(x, self.used.weight) @ self.turned.weight.t()
            weight = self.computed.weight - self.computed.weight.mean(1, keepdim=True)
            return self.owner(nn.functional.linear(x, weight)) + self.constant.weight.mean(0)

    model = Seen()
    structure = lq.inspect(model, X)
    assert "turned" not in structure.ran and "owner" in structure.ran
    sites = {site.name for site in structure.sites}
    model = lq.attach(model, 8, 8, structure=structure)
    assert {q.name for q in quantizers(model)} <= sites


def test_saved_structures_of_before_know_of_no_run():
    model = Whole().eval()
    values = lq.inspect(model, X).to_dict()
    del values["ran"]
    lq.attach(model, 4, 8, structure=Structure.from_dict(values))
    assert weights(model) == {
        "net.gate",
        "net.head",
        "net.experts.0.0",
        "net.experts.0.2",
        "pair.student.0",
        "pair.student.2",
    }


def test_a_structure_of_a_part():
    model, part = Whole().eval(), Part().eval()
    lq.attach(model, 4, 8, structure=lq.inspect(part, X).under("net"))
    assert weights(model) >= OF_NET
    assert not weights(model) & ASIDE
