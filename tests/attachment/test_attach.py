"""attach and detach are exact inverses, on every layer kind; what lies between them."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import input_quantizer, quantized_layers, weight_quantizer
from lq.errors import DataError, PatternError, SpecError, StateError
from tests.attachment.networks import (
    LAYERS,
    assert_identical,
    channel,
    every_layer,
    identity,
    images,
    layer_and_input,
    quantized,
    small,
    widths_of,
)
from tests.quantizer.test_quantizer import grids

# --- inverses ---------------------------------------------------------------------------------------------------------


@every_layer
def test_attach_quantizes_each_channel(kind):
    layer, x = layer_and_input(kind)
    weight = layer.weight.detach().clone()
    count = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None) or layer.num_embeddings
    bits = [0, 1, 2, 3, 4, 8, 2][:count]
    lq.attach(layer, lq.QuantSpec(tuple(bits), signed=True), first_last=None)
    assert isinstance(layer, LAYERS[kind][0]().__class__)
    quantizer = weight_quantizer(layer)
    for c, (step, low, high, offset) in enumerate(grids(quantizer, len(bits))):
        values, original = channel(layer, layer.weight.detach(), c), channel(layer, weight, c)
        assert values.unique().numel() <= 2 ** bits[c]
        expected = ((original.double() / step - offset).round() + offset).clamp(low, high) * step
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-12)
    assert torch.isfinite(layer(x)).all()


@every_layer
@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_detach_is_the_inverse(kind, estimator):
    layer, x = layer_and_input(kind)
    model = nn.Sequential(layer)
    before, output = identity(model), model(x)
    activations = None if kind == "embedding" else 8
    lq.attach(model, 2, first_last=None, overrides={"0": {"activations": activations}}, estimator=estimator)
    lq.calibrate(model, [x])
    assert not torch.equal(model(x), output)
    assert layer.weight.grad_fn is not None
    lq.detach(model)
    assert_identical(identity(model), before)
    assert torch.equal(model(x), output)
    assert layer.weight.is_leaf


def test_detach_leaves_no_flag_of_its_hook():
    model = lq.detach(quantized())
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_baked_forward_is_the_quantized_one(kind, training):
    layer, x = layer_and_input(kind)
    model = nn.Sequential(layer).train(training)
    keys = list(model.state_dict())
    lq.attach(model, 3, first_last=None)
    with torch.no_grad():
        expected = model(x)
    lq.detach(model, bake=True)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert isinstance(layer.weight, nn.Parameter)


def test_baked_models_keep_their_input_quantizers_until_the_second_detach():
    model, x = quantized(), images()
    expected, baked = model(x), lq.detach(quantized(), bake=True)
    assert torch.equal(baked(x), expected)
    assert list(widths_of(baked).values()) == [(None, 8)] * 3
    lq.detach(baked)
    assert not any(True for _ in quantized_layers(baked))
    assert not torch.equal(baked(x), expected)


def test_baked_model_trains_after_inference_mode():
    model = quantized(activations=None)
    with torch.inference_mode():
        model(images())
    expected = model(images())
    lq.detach(model, bake=True)
    assert torch.equal(model(images()), expected)
    model(images()).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model(images()), expected)


def test_training_between_attach_and_detach_moves_the_float_weights():
    model = quantized()
    parameter = weight_quantizer(model[0]) and model[0].parametrizations.weight.original
    before = parameter.detach().clone()
    model.train()
    model(images()).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    lq.detach(model)
    assert model[0].weight is parameter
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("detach_original", [True, False])
def test_copies_are_independent(detach_original):
    model, x = quantized(), images()
    expected = model(x).detach()
    clone = copy.deepcopy(model)
    gone, kept = (model, clone) if detach_original else (clone, model)
    lq.detach(gone)
    assert torch.equal(kept(x), expected)
    assert torch.equal(gone(x), small()(x))
    with torch.no_grad():
        gone[0].weight.zero_()
    assert torch.equal(kept(x), expected)
    lq.detach(kept)
    assert torch.equal(kept(x), small()(x))
    assert type(kept[0]) is type(gone[0]) is nn.Conv2d


def test_copies_calibrate_on_their_own():
    model = quantized()
    step = input_quantizer(model[2]).step.item()
    clone = lq.calibrate(copy.deepcopy(model), [images(8) * 100])
    assert input_quantizer(clone[2]).step.item() > 2 * step
    assert input_quantizer(model[2]).step.item() == step


def test_attach_again_after_detach():
    model = lq.detach(quantized())
    lq.calibrate(lq.attach(model, 4, 8), [images(16, 2)])
    assert torch.equal(model.eval()(images()), quantized()(images()))


# --- which layers, which widths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"0": (8, None), "2": (4, 4), "5": (4, 4), "6": (8, 8)}),
        ({"first_last": None}, {"0": (4, None), "2": (4, 4), "5": (4, 4), "6": (4, 4)}),
        ({"first_last": 6}, {"0": (6, None), "2": (4, 4), "5": (4, 4), "6": (6, 6)}),
        ({"include": ["2", "6"]}, {"2": (4, 4), "6": (8, 8)}),
        ({"exclude": "5"}, {"0": (8, None), "2": (4, 4), "6": (8, 8)}),
        ({"include": "?", "exclude": ["0", "2"]}, {"5": (4, 4), "6": (8, 8)}),
        ({"activations": None}, {"0": (8, None), "2": (4, None), "5": (4, None), "6": (8, None)}),
        ({"weights": None}, {"2": (None, 4), "5": (None, 4), "6": (None, 8)}),
        (
            {"overrides": {"*": {"weights": 3}, "5": {"weights": 2, "activations": None}, "0": {"activations": 8}}},
            {"0": (3, 8), "2": (3, 4), "5": (2, None), "6": (3, 8)},
        ),
        ({"weights": None, "activations": None, "overrides": {"5": {"weights": 2}}}, {"5": (2, None)}),
        ({"overrides": {"5": {"weights": None, "activations": None}}}, {"0": (8, None), "2": (4, 4), "6": (8, 8)}),
    ],
)
def test_widths(options, expected):
    assert widths_of(lq.attach(small(), **{"weights": 4, "activations": 4, **options})) == expected


def test_a_timm_model_says_which_layer_is_last():
    model = small()
    model.pretrained_cfg = {"first_conv": "2", "classifier": ["5"]}
    assert widths_of(lq.attach(model, 4, 4)) == {"0": (4, 4), "2": (8, None), "5": (8, 8), "6": (4, 4)}


def test_a_layer_of_another_kind_can_be_named():
    model = nn.Sequential(nn.Bilinear(2, 3, 4), nn.Linear(4, 2))
    assert widths_of(lq.attach(copy.deepcopy(model))) == {"1": (8, None)}
    assert widths_of(lq.attach(model, include="0")) == {"0": (4, None)}
    assert model[0].weight[0].unique().numel() <= 16


def test_set_bits_finds_the_ranges_of_the_new_width():
    model, fresh = lq.attach(small(), 4), lq.attach(small(), 4, overrides={"5": {"weights": 2}})
    lq.set_bits(model, {"5": 2, "2": [0, 1, 2, 8]})
    assert torch.equal(model[5].weight, fresh[5].weight)
    assert [row.unique().numel() <= 2**b for row, b in zip(model[2].weight, (0, 1, 2, 8), strict=True)] == [True] * 4
    assert model[2].weight[0].abs().max() == 0


def test_set_estimator_reaches_every_quantizer():
    model = quantized(estimator="lsq")
    steps = [p for name, p in model.named_parameters() if name.endswith("log2_step")]
    assert len(steps) == 7
    assert all(p.requires_grad for p in steps)
    model.train()(images()).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in steps)
    lq.set_estimator(model, "ste")
    assert not any(p.requires_grad for p in steps)


def test_inputs_by_keyword_are_quantized():
    model = quantized()
    x = torch.randn(3, 8)
    assert torch.equal(model[6](input=x), model[6](x))
    lq.detach(model)
    assert model[6](input=x).shape == (3, 3)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weights": lq.QuantSpec(3), "first_last": None}, {"activations": None}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_model_is_the_eager_one(options):
    model, x = quantized(**options), images()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(small()(x), model(x), rtol=1e-3)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": "leyer"}, PatternError, "include pattern 'leyer' matches none of the 4 layers; did you mean"),
        ({"exclude": "7"}, PatternError, "exclude pattern '7' matches none of the 4 layers; did you mean"),
        ({"overrides": {"fc": {"weights": 2}}}, PatternError, "overrides pattern 'fc' matches none of the 4 layers"),
        ({"overrides": {"5": 2}}, SpecError, r"overrides\['5'\]=2; expected a mapping with 'weights' and/or"),
        ({"overrides": {"5": {}}}, SpecError, r"overrides\['5'\]={}; expected a mapping"),
        ({"overrides": {"5": {"weight": 2}}}, SpecError, "expected a mapping with 'weights' and/or 'activations'"),
        ({"weights": 9}, SpecError, "bits=9 is not a width"),
        ({"activations": 12}, SpecError, "bits=12 is not a width"),
        ({"first_last": 9}, SpecError, "bits=9 is not a width"),
        ({"weights": None}, SpecError, "weights=None and activations=None leave nothing to quantize"),
        ({"activations": lq.QuantSpec(8)}, SpecError, "activations are quantized per tensor"),
        ({"estimator": "pact"}, SpecError, "estimator='pact' is unknown"),
        ({"weights": lq.QuantSpec((2, 4))}, SpecError, "0.weight: 2 widths were given for 4 channels"),
    ],
)
def test_errors_of_attach_leave_the_model_alone(options, error, message):
    model = small()
    before = identity(model)
    with pytest.raises(error, match=message):
        lq.attach(model, **options)
    assert_identical(identity(model), before)


@pytest.mark.parametrize("index", [0, 5])
def test_weights_that_are_not_finite_leave_the_model_alone(index):
    model = small()
    with torch.no_grad():
        model[index].weight[0, 0] = torch.nan
    before = list(model.state_dict())
    with pytest.raises(DataError, match=f"^{index}.weight has "):
        lq.attach(model)
    assert list(model.state_dict()) == before


def test_attach_twice():
    with pytest.raises(StateError, match=r"has quantizers already; lq.detach\(model\) first"):
        lq.attach(quantized())


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.BatchNorm2d(3), nn.Sequential()])
def test_nothing_to_quantize(model):
    with pytest.raises(StateError, match="has no layer to quantize; attach after its layers are built"):
        lq.attach(model)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lq.detach, "lq.detach"),
        (lambda m: lq.set_bits(m, {"0": 4}), "lq.set_bits"),
        (lambda m: lq.set_estimator(m, "lsq"), "lq.set_estimator"),
        (lambda m: lq.calibrate(m, []), "lq.calibrate"),
        (lq.summary, "lq.summary"),
    ],
)
def test_unattached_models(call, name):
    with pytest.raises(StateError, match=rf"{name} needs a model with quantizers, Sequential has none; call lq.attach"):
        call(small())


def test_set_bits_errors():
    model = quantized()
    with pytest.raises(PatternError, match="set_bits pattern 'fc' matches none of the 4 layers"):
        lq.set_bits(model, {"fc": 4})
    with pytest.raises(SpecError, match="2.weight: 3 widths were given for 4 channels"):
        lq.set_bits(model, {"2": [1, 2, 3]})


def test_activations_before_calibration():
    with pytest.raises(StateError, match="2.input has no range yet"):
        lq.attach(small(), 4, 8)(images())


def test_not_finite_in_the_forward_names_the_layer():
    model = quantized()
    with pytest.raises(DataError, match="^6.input has 1 NaN or Inf of 8 values"):
        model[6](torch.tensor([1.0] * 7 + [float("nan")]))
    with torch.no_grad():
        model[5].parametrizations.weight.original[0, 0] = torch.inf
    with pytest.raises(DataError, match="^5.weight has 1 NaN or Inf of 128 values"):
        model(images())


def test_models_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(StateError, match="0.weight is on the meta device and has no values.*to_empty"):
        lq.attach(model, 4)
    assert type(model[0]) is nn.Linear
