"""Units of small models, of light timm models, and by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.errors import PatternError, SpecError, StateError
from lq.reconstruction.quantized_model import QuantizedModel
from lq.reconstruction.units import Unit, find_units
from tests.models import Block, Loop, Residual, UNet
from tests.reconstruction.networks import NETWORKS, Basic, ResNet, network, samples


def cut(model, x, units="layer"):
    """The units of a model that gets quantizers for it."""
    lq.attach(model.eval(), 4, first_last=None)
    twin = float_copy(model)
    with torch.no_grad():
        return model, find_units(QuantizedModel(model), twin, units, lambda: twin(x), x)


def names(found):
    return [unit.name for unit in found]


def layers_of(model, unit):
    known = QuantizedModel(model).weighted
    return [n for n in known for module in unit.modules if n == module or n.startswith(f"{module}.") or not module]


def order_of_calls(model, x):
    called = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in layers(model)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return called


def layers(model):
    return [(name, model.get_submodule(name)) for name in QuantizedModel(model).weighted]


def check(model, x, found):
    """Every layer that runs once is in one unit, and units run in their order."""
    called = order_of_calls(model, x)
    once = [name for name in called if called.count(name) == 1]
    covered = [name for unit in found for name in layers_of(model, unit)]
    assert sorted(covered) == sorted(once)
    firsts = [min(called.index(name) for name in layers_of(model, unit)) for unit in found]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_layer_is_in_one_unit_in_order(kind, granularity):
    model, x = network(kind)
    model, found = cut(model, x, granularity)
    with torch.no_grad():
        lq.calibrate(model, [x])
    check(model, x, found)


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        ("test_resnet", 32, ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("test_vit", 160, [f"blocks.{i}" for i in range(6)]),
        ("test_convnext", 64, ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"]),
        ("test_mambaout", 32, ["stages.0.blocks.0", "stages.1", "stages.2.blocks.0", "stages.2.blocks.1"]),
        ("test_efficientnet", 32, []),
    ],
)
def test_light_timm_models(name, size, blocks):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), samples((3, size, size), 2)
    model, found = cut(model, x, "block")
    check(model, x, found)
    assert set(blocks) <= set(names(found))
    assert all(unit.is_block for unit in found if unit.name in blocks)


def test_residual_blocks_need_no_help_of_the_model():
    _, found = cut(ResNet(3), samples((3, 8, 8), 2), "block")
    assert names(found) == ["stem+act", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert [unit.is_block for unit in found] == [False, True, True, True, False]


def test_blocks_are_the_innermost_that_hold_a_sum():
    class Group(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(Basic(3, 3), Basic(3, 3))

        def forward(self, x):
            return x + self.parts(x)

    _, found = cut(nn.Sequential(Group(), nn.Conv2d(3, 2, 1)), samples((3, 8, 8), 2), "block")
    assert names(found) == ["0.parts.0", "0.parts.1", "1"]


def test_blocks_that_read_a_permuted_tensor():
    class Last(nn.Module):
        """Channels come last, as in ConvNeXt."""

        def __init__(self):
            super().__init__()
            self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
            self.block = Mixed()
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.block(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x).relu()) + x

    _, found = cut(Last(), samples((3, 8, 8), 2), "block")
    assert names(found) == ["patch", "block", "head"]


def test_a_model_that_is_a_block_is_cut_inside():
    _, found = cut(Block(), samples((5, 8), 2), "block")
    assert len(found) == 2 or all(not unit.is_block for unit in found)
    assert "" not in names(found) and "(network)" not in names(found)


def test_a_projection_by_functions_is_no_block():
    class Pooled(Basic):
        def forward(self, x):
            return self.act2(self.conv2(self.act1(self.conv1(x))) + F.avg_pool2d(x, 1) * 2)

    _, found = cut(nn.Sequential(Pooled(3, 3), nn.Conv2d(3, 2, 1)), samples((3, 8, 8), 2), "block")
    assert "0" not in names(found)


def test_a_sum_of_two_others_is_no_residual():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x) + self.c(x)

    _, found = cut(nn.Sequential(nn.Linear(8, 8), Both(), nn.Linear(8, 2)), samples((8,), 2), "block")
    assert names(found) == ["0", "1.a", "1.b", "1.c", "2"]


def test_activation_functions_belong_to_the_layer_before():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.ReLU(), nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 2))
    _, found = cut(model, samples((8,), 2))
    assert names(found) == ["0+1+2", "3", "5"]


class ReadTwice(nn.Module):
    """The activation reads what another reads too."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.act, self.b = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        if self.kind == "sum":
            return self.b(self.act(x) + x)
        if self.kind == "changed":
            return self.b(self.act(x * 2))
        if self.kind == "again":
            return self.b(self.act(self.act(x)))
        return self.b(self.act(x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("plain", ["a+act", "b"]), ("sum", ["a", "b"]), ("changed", ["a", "b"]), ("again", ["a", "b"])],
)
def test_activation_functions_that_do_not_belong(kind, expected):
    _, found = cut(ReadTwice(kind), samples((8,), 2))
    assert names(found) == expected


def test_normalization_and_dropout_do_not_belong():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.Softmax(-1))
    _, found = cut(model, samples((8,), 2))
    assert names(found) == ["0", "3"]


def test_layers_that_are_called_more_than_once_are_left_out():
    _, found = cut(Loop(), samples((6,), 3))
    assert names(found)[-1] in ("positive", "negative")
    assert len(found) == 1
    _, found = cut(Residual(), samples((3, 8, 8), 2), "block")
    assert names(found) == ["stem", "conv1", "conv2", "head"]


def test_a_tied_weight_counts_for_both_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    _, found = cut(model, samples((8,), 2))
    assert names(found) == ["0+1", "2"]


def test_the_network_is_one_unit():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ResNet(2)

        def forward(self, x):
            return self.net(x).softmax(-1)

    x = samples((3, 8, 8), 2)
    assert names(cut(Wrapped(), x, "network")[1]) == ["net"]
    assert names(cut(ResNet(2), x, "network")[1]) == ["(network)"]


def test_the_network_is_a_module_that_runs():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    assert names(cut(Listed(), samples((8,), 2), "network")[1]) == ["(network)"]


def test_units_by_name():
    x = samples((3, 8, 8), 2)
    model, found = cut(ResNet(3), x, ["head", ["blocks.1", "blocks.2"], "blocks.0.conv1"])
    assert names(found) == ["blocks.0.conv1", "blocks.1+blocks.2", "head"]
    assert found[1].bind(model) == [model.blocks[1], model.blocks[2]]
    assert names(cut(UNet(), x, [["down"], "deep"])[1]) == ["down", "deep"]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["nothing"], "units: 'nothing' is no module of ResNet"),
        (["act"], r"units: 'act' has no quantized layer, or one that another unit has already"),
        (["blocks.0", "blocks.0.conv1"], "'blocks.0.conv1' has no quantized layer, or one that another unit has"),
        ([["blocks.0.act1", "nothing"]], "units: 'nothing' is no module"),
    ],
)
def test_wrong_names(units, message):
    with pytest.raises(PatternError, match=message):
        cut(ResNet(2), samples((3, 8, 8), 2), units)


@pytest.mark.parametrize(
    "units", [[["stem", "blocks.0"]], [["blocks.1", "blocks.0"]], [["stem", "stem"]], [["stem", "head"]], [[]]]
)
def test_names_that_make_no_chain(units):
    with pytest.raises(PatternError, match="units: "):
        cut(ResNet(2), samples((3, 8, 8), 2), units)


def test_modules_that_are_not_called_once_cannot_be_named():
    with pytest.raises(PatternError, match="units: 'again' is not called exactly once with one tensor in and one out"):
        cut(Loop(), samples((6,), 3), ["again"])


def test_an_unknown_granularity():
    with pytest.raises(SpecError, match=r"units='blocks' is unknown; use one of \('layer', 'block', 'network'\)"):
        cut(ResNet(2), samples((3, 8, 8), 2), "blocks")


def test_nothing_to_reconstruct():
    x = samples((8,), 2)
    model = lq.attach(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), None, 4).eval()
    twin = float_copy(model)
    with pytest.raises(StateError, match="Sequential has no layer with a quantized weight, so that there is nothing"):
        find_units(QuantizedModel(model), twin, "layer", lambda: twin(x), x)
    shared = nn.Linear(8, 8)
    with pytest.raises(StateError, match="no layer of Sequential runs once in a forward: there is no unit"):
        cut(nn.Sequential(shared, nn.ReLU(), shared), x)


def test_names_of_units():
    assert Unit(("a", "b.c")).name == "a+b.c"
    assert Unit(("",)).name == "(network)"
