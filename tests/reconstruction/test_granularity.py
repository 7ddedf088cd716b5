"""MRECG's merges: capacities by hand, the pairs that differ most, chains of them."""

import math

import pytest
import torch
from torch import nn

import lq
from lq.errors import SpecError
from lq.reconstruction.flow import Flow, SampleLayout
from lq.reconstruction.granularity import merge_units, module_capacity
from lq.reconstruction.quantized_model import QuantizedModel
from lq.reconstruction.units import Unit
from tests.helpers import assert_same
from tests.reconstruction.networks import Basic, ResNet, Work, quantized, samples


def capacity(model, modules):
    return module_capacity(QuantizedModel(model).layers_in(modules))


def test_capacity_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(Basic(4, 6, 2))
    lq.attach(model, lq.QuantSpec(3, signed=True), first_last=None, exclude="0.shortcut")
    assert capacity(model, [model[0]]) == pytest.approx(3 * (4 * 6 * 9 * 1.6 + 6 * 6 * 9))
    lq.set_bits(model, {"0.conv2": [2, 2, 2, 4, 4, 4]})
    assert capacity(model, [model[0]]) == pytest.approx(3 * 4 * 6 * 9 * 1.6 + 3 * 6 * 6 * 9)
    parts = [model[0].conv1, model[0].conv2]
    assert capacity(model, parts) == pytest.approx(capacity(model, [model[0]]))
    assert capacity(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 3)), list(model)) == 0


@pytest.mark.parametrize(
    ("layer", "alpha"),
    [
        (nn.Conv1d(2, 3, 3, stride=2), 1.6),
        (nn.Conv2d(2, 3, 3, stride=(1, 2)), 1.6),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), 1.6),
        (nn.Conv2d(2, 3, 3), 1),
        (nn.Linear(6, 3), 1),
    ],
)
def test_alpha(layer, alpha):
    model = lq.attach(nn.Sequential(layer), 4, first_last=None)
    weight = model[0].parametrizations.weight.original
    assert capacity(model, [model[0]]) == pytest.approx(4 * alpha * weight.numel())


def chain(count, chained=None, blocks=None):
    """Units a, b, c, ...; which of them are blocks, and which read the output of the one before alone."""
    names = "abcdefghij"[:count]
    units = [Unit((name,), is_block=blocks is None or name in blocks) for name in names]
    direct = tuple(k - 1 if k and (chained is None or name in chained) else None for k, name in enumerate(names))
    lies = tuple(SampleLayout(0, 1) for _ in names)
    needs = tuple(frozenset({k - 1} if k else ()) for k in range(count))
    return units, Flow(direct, needs, tuple((found,) for found in lies), lies, ())


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([1, 2, 100, 150], 1, ["a", "b+c", "d"]),
        ([1, 2, 100, 150], 2, ["a+b+c", "d"]),
        ([1, 10, 30, 300], 2, ["a+b", "c+d"]),
        ([1, 10, 30, 300], 3, ["a+b+c+d"]),
        ([1, 10, 30, 300], 9, ["a+b+c+d"]),
        ([300, 20, 10, 1], 1, ["a+b", "c", "d"]),
        ([100, 101, 1, 1], 1, ["a", "b+c", "d"]),
        ([1, 1, 0.0, 1], 1, ["a", "b+c", "d"]),
    ],
)
def test_the_pairs_that_differ_most_are_merged(scores, count, expected):
    units, flow = chain(4)
    found, merges = merge_units(units, flow, scores, count, "loss")
    assert [unit.name for unit in found] == expected
    assert merges.merged == tuple(expected) and merges.units == tuple("abcd")
    assert merges.metric == "loss" and merges.scores == tuple(scores) and not merges.unchained
    assert all(unit.is_block for unit in found)


def test_single_layers_are_not_merged():
    units, flow = chain(4, blocks="bc")
    found, _ = merge_units(units, flow, [1, 1000, 1001, 1], 1, "modcap")
    assert [unit.name for unit in found] == ["a", "b+c", "d"]
    found, _ = merge_units(units, flow, [1, 1000, 1001, 1], 5, "modcap")
    assert [unit.name for unit in found] == ["a", "b+c", "d"]


@pytest.mark.parametrize(
    ("chained", "scores", "count", "expected", "missed"),
    [
        ("cd", [1, 100, 200, 201], 1, ["a", "b+c", "d"], (("a", "b"),)),
        ("cd", [1, 100, 200, 201], 2, ["a", "b+c+d"], (("a", "b"),)),
        ("d", [1, 100, 1000, 1001], 1, ["a", "b", "c+d"], (("a", "b"), ("b", "c"))),
        ("bc", [1, 100, 200, 250], 1, ["a+b", "c", "d"], ()),
        ("bd", [1, 100, 300, 310], 1, ["a+b", "c", "d"], ()),  # the second largest was not asked for
        ("bd", [1, 100, 300, 310], 2, ["a+b", "c+d"], (("b", "c"),)),
        ("", [1, 100, 200, 300], 1, ["a", "b", "c", "d"], (("a", "b"),)),
    ],
)
def test_pairs_that_do_not_chain_are_reported(chained, scores, count, expected, missed):
    units, flow = chain(4, chained)
    found, merges = merge_units(units, flow, scores, count, "loss")
    assert [unit.name for unit in found] == expected
    assert merges.unchained == missed


def test_merging_nothing_is_an_error():
    units, flow = chain(3)
    with pytest.raises(SpecError, match="merges=0; at least 1 pair has to be merged, or use units='block'"):
        merge_units(units, flow, [1, 2, 3], 0, "loss")


@pytest.fixture(scope="module")
def resnet18():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model("resnet18", num_classes=4).eval(), samples((3, 32, 32), 2)
    lq.fold_batchnorm(model)
    lq.attach(model, 4, None)
    return Work(model, [x], "block", chunk=2)


def test_resnet18_as_the_authors_list_it(resnet18):
    work = resnet18
    scores = [capacity(work.model, unit.bind(work.model)) for unit in work.units]
    found, merges = merge_units(work.units, work.flow, scores, 2, "modcap")
    merged = [unit.name for unit in found if len(unit.modules) > 1 and unit.is_block]
    assert merged == ["layer1.1+layer2.0", "layer2.1+layer3.0"]
    assert not merges.unchained
    by_hand = 4 * (64 * 128 * 9 * 1.6 + 128 * 128 * 9 + 64 * 128 * 1.6)
    assert dict(zip(work.names, scores, strict=True))["layer2.0"] == pytest.approx(by_hand)


def test_adjacent_picks_of_resnet18_are_triples(resnet18):
    work = resnet18
    scores = [1.0] * len(work.units)
    scores[work.names.index("layer2.1")] = 100.0
    found, _ = merge_units(work.units, work.flow, scores, 2, "loss")
    assert [u.name for u in found if "+" in u.name and u.is_block] == ["layer2.0+layer2.1+layer3.0"]


@pytest.mark.parametrize("metric", ["modcap", "loss"])
def test_the_search_leaves_the_model_as_it_was(metric, monkeypatch, tmp_path):
    """The main run starts from what it would start from without a search, to the bit."""
    torch.manual_seed(0)
    data = list(samples((3, 8, 8), 8).split(4))
    model = quantized(ResNet(4).eval(), data, skip=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    opened = lq.reconstruction.progress.Progress.open.__func__

    def watched(cls, path, model, *rest, **more):
        assert_same(dict(model.state_dict()), before)
        raise InterruptedError

    monkeypatch.setattr(lq.reconstruction.progress.Progress, "open", classmethod(watched))
    options = {"units": "mixed", "metric": metric, "iterations": 3, "search_iterations": 3, "batch_size": 4}
    with pytest.raises(InterruptedError):
        lq.reconstruct(model, data, **options, resume=tmp_path / "units.pt")
    monkeypatch.setattr(lq.reconstruction.progress.Progress, "open", classmethod(opened))
    found = lq.reconstruct(model, data, **options, merges=1)
    names = [unit.name for unit in found.units]
    assert found.merges.metric == metric and len(found.merges.scores) == len(found.merges.units)
    assert all(math.isfinite(score) for score in found.merges.scores)
    assert tuple(names) == found.merges.merged and sum("blocks" in n and "+" in n for n in names) == 1
    direct = quantized(ResNet(4).eval(), data, skip=True)
    direct.load_state_dict(before)
    same = lq.reconstruct(direct, data, iterations=3, batch_size=4, units=[n.split("+") for n in names])
    assert [(u.before, u.after) for u in same.units] == [(u.before, u.after) for u in found.units]
    assert_same(dict(direct.state_dict()), dict(model.state_dict()))
