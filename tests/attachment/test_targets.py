"""Targets where quantizers are attached: errors before anything is trained, warnings, and what a width means."""

import warnings

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import activation_quantizers, quantizers
from lq.attachment.targets import check_model, grid_of
from lq.errors import NoEffectWarning, SpecError
from lq.quantizer.targets import TARGETS, Grid


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()  # fmt: skip


def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def attached(target, *, integer=True, **options):
    model = network()
    return lq.attach(model, **{"weights": 8, "activations": 8, **options}, structure=lq.inspect(model, images()),
                     integer=integer, target=target)  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_eight_bits_have_nothing_to_say(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lq.calibrate(attached(target), [images()])
    check_model(model, TARGETS[target])


def test_a_width_is_what_the_engine_computes_with():
    specs = {site.spec for site in activation_quantizers(attached("tensorrt")).values()}
    assert specs == {lq.QuantSpec(8, per_channel=False, symmetric=True, signed=True)}
    plain = {site.spec for site in activation_quantizers(attached(None)).values()}
    assert plain == {lq.QuantSpec(8, per_channel=False, symmetric=False)}
    assert plain == {site.spec for site in activation_quantizers(attached("onnxruntime")).values()}
    own = lq.QuantSpec(8, per_channel=False, symmetric=True, signed=True, range="minmax")
    assert {s.spec for s in activation_quantizers(attached("tensorrt", activations=own)).values()} == {own}


def test_overrides_count():
    with pytest.raises(SpecError, match=r"1 activation has other widths than 8 bits \(2\.input\): use activations=8$"):
        attached("tensorrt", overrides={"2": {"activations": 4}})
    with pytest.raises(SpecError, match=r"1 weight has 16 bits \(5\.weight\): use weights=8 or fewer$"):
        attached("tensorrt", overrides={"5": {"weights": 16}})


def test_what_is_refused_leaves_the_model_alone():
    model = network()
    with pytest.raises(SpecError, match=r"target='tensorrt' does not run this network: 3 weights have zero points"):
        lq.attach(model, 8, 8, symmetric=False, target="tensorrt")
    assert not list(quantizers(model))


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("onnxruntime", {"integer": False}, "the first layer, which reads the network's input, and convolutions whose"),
        ("openvino", {"integer": False}, "the first layer, which reads the network's input: use integer=True"),
        ("openvino", {"activations": None}, "weights alone are quantized, so that no product is of integers: use act"),
        ("openvino", {"weights": None}, "activations alone are quantized, so that no product is of integers: use wei"),
        ("onnxruntime", {"weights": 16}, "3 weights have 16 bits"),
        ("openvino", {"symmetric": False}, "3 weights have 8 bits with zero points of their own"),
    ],
)
def test_what_is_computed_in_float_is_a_warning(target, options, said):
    with pytest.warns(NoEffectWarning, match=f"target='{target}' computes a part of this network in float") as found:
        attached(target, **options)
    assert len(found) == 1 and said in str(found[0].message)


def test_an_unknown_target():
    with pytest.raises(SpecError, match=r"^target='tensort' is unknown; did you mean 'tensorrt'\? Use"):
        lq.attach(network(), 8, target="tensort")


def test_widths_of_now_are_looked_at():
    model = lq.calibrate(attached("tensorrt"), [images()])
    lq.set_bits(model, {"2": [0, 1, 4, 8]}, {"2.input": 8})
    check_model(model, TARGETS["tensorrt"])
    lq.set_bits(model, {}, {"2.input": 6})
    with pytest.raises(SpecError, match=r"1 activation has other widths than 8 bits \(2\.input\)"):
        check_model(model, TARGETS["tensorrt"])


def test_grids_of_quantizers():
    model = lq.calibrate(attached(None), [images()])
    found = {q.name: grid_of(q) for q in quantizers(model)}
    assert found["0.input"] == Grid(False, (8,), frozenset({"anywhere"}))
    assert found["2.input"] == Grid(False, (8,), frozenset({"lowest"}))
    assert found["2.weight"] == Grid(True, (8,), frozenset({"middle"}))
    lq.set_bits(model, {"2": [0, 1, 4, 8]})
    assert {q.name: grid_of(q) for q in quantizers(model)}["2.weight"] == Grid(
        True, (0, 1, 4, 8), frozenset({"middle"})
    )
    lq.set_bits(model, {"2": 0})
    assert {q.name: grid_of(q) for q in quantizers(model)}["2.weight"] is None
    fresh = {q.name: grid_of(q) for q in quantizers(attached(None))}
    assert fresh["2.input"] == Grid(False, (8,), frozenset({"anywhere", "lowest"}))
