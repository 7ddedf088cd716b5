"""attach and detach are exact inverses, on every layer kind; what lies between them."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.running import CallQuantizers
from lq.attachment.sites import input_quantizer, is_attached, quantized_layers, quantizers, weight_quantizer
from lq.errors import DataError, PatternError, SpecError, StateError
from lq.quantizer.weight_quantizer import WeightQuantizer
from tests.models import example
from tests.quantizer.test_quantizer import grids

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 8, 8)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "transposed2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed2d depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 3, groups=2), (2, 4, 5, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (3, 4)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def layer_and_input(kind, seed=0):
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    return make(), torch.randint(0, 7, (3,)) if shape is None else torch.randn(shape)


def small(seed=0):
    """A network with first, middle and last layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)
    )


def images(n=4, seed=1):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def quantized(**options):
    """A calibrated network in eval mode."""
    options = {"weights": 4, "activations": 8, **options}
    return lq.calibrate(lq.attach(small(), **options), [images(16, 2)]).eval()


def identity(model):
    """Everything that detach has to give back."""
    return (
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        list(model.state_dict()),
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, type(module)) for name, module in model.named_modules()],
        [(len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks)) for m in model.modules()],
    )


def assert_identical(now, before):
    assert now[0] == before[0]
    assert now[1] == before[1]
    assert all(torch.equal(now[2][key], value) for key, value in before[2].items())
    assert now[3:] == before[3:]


def widths_of(model):
    """Widths of weight and input by layer name."""
    found = {}
    for name, module in quantized_layers(model):
        weight, site = weight_quantizer(module), input_quantizer(module)
        found[name] = (weight and int(weight.bits.flatten()[0]), site and int(site.bits))
    return found


# --- inverses ---------------------------------------------------------------------------------------------------


def channel(layer, weight, c):
    """The part of a weight that makes output channel `c`; rows of an embedding."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight[c]
    per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    group = c // per_group
    return weight[group * inputs : (group + 1) * inputs, c % per_group]


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


# --- which layers, which widths ------------------------------------------------------------------------------------


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


def test_of_a_first_recurrent_module_only_weights_of_the_input_are_wide():
    """Those that multiply its states, or what its first layer gives, are no first layer's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(4, 6, num_layers=2, batch_first=True)), torch.randn(2, 3, 4)
    model.append(nn.Linear(6, 5)).append(nn.Linear(5, 3))
    model.forward = lambda x: model[2](model[1](model[0](x)[0]))
    lq.attach(model, 3, structure=lq.inspect(model, x))
    widths = {name.rpartition("_")[2]: int(q.bits[0]) for name, q in of_functions(model).items()}
    assert widths == {"0": 8, "1": 3, "4": 3, "5": 3}


def of_functions(model):
    """Quantizers of weights that functions use, by name."""
    at_calls = [q for m in model.modules() if isinstance(m, CallQuantizers) for q in m._modules.values()]
    return {q.name: q for q in at_calls if isinstance(q, WeightQuantizer)}


@pytest.mark.parametrize("kind", ["text", "encoder", "odd weights"])
@pytest.mark.parametrize("widths", [3, 0, "by channel"])
def test_set_bits_finds_the_ranges_of_weights_of_functions(kind, widths):
    """The ranges that the calls find of what they get."""
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x), first_last=None), [x])
    found = of_functions(model)
    wanted = {
        n: [2 + i % 3 for i in range(q.bits.numel())] if widths == "by channel" else widths for n, q in found.items()
    }
    lq.set_bits(model, wanted)
    assert found and all(q.calibrated for q in quantizers(model))
    known = {name: q.log2_step.clone() for name, q in found.items() if q.source is not None}
    assert known
    for name in known:
        found[name].forget_range()
    model.eval()(x)
    for name, quantizer in found.items():
        assert torch.equal(quantizer.bits, torch.tensor(wanted[name]).float().expand_as(quantizer.bits))
        assert name not in known or torch.equal(quantizer.log2_step, known[name])


def test_set_bits_of_a_weight_that_is_computed_first():
    """It keeps its range until the next call finds the one of the new width."""
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 8, structure=lq.inspect(model, x), first_last=None), [x])
    quantizer = of_functions(model)["conv.conv2d_0_weight"]
    lq.set_bits(model, {"conv.conv2d_0": 2})
    kept = quantizer.step.clone()
    model.eval()(x)
    found = quantizer.step.clone()
    assert quantizer.calibrated and not torch.equal(found, kept)
    quantizer.forget_range()
    model(x)
    assert torch.equal(quantizer.step, found)


def test_a_model_with_other_widths_of_functions_is_reconstructed_and_saved(tmp_path):
    model, x = example("encoder")
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x])
    lq.set_bits(model, dict.fromkeys(of_functions(model), 3))
    lq.reconstruct(model, [x], iterations=2)
    lq.save(model, tmp_path / "m.safetensors")
    assert torch.equal(lq.load(tmp_path / "m.safetensors", example("encoder")[0])(x), model.eval()(x))


def test_float_checkpoints_give_weights_of_functions_their_ranges():
    model, x = example("encoder")
    lq.calibrate(lq.attach(model, 4, structure=lq.inspect(model, x)), [x])
    other = {key: 3 * value for key, value in example("encoder")[0].state_dict().items()}
    before = {name: q.step.clone() for name, q in of_functions(model).items()}
    model.load_state_dict(other)
    assert before
    for name, step in before.items():
        torch.testing.assert_close(of_functions(model)[name].step, 3 * step)


@pytest.mark.parametrize("kind", ["text", "encoder", "odd weights"])
def test_baked_weights_of_functions(kind):
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 3, 6, structure=lq.inspect(model, x), first_last=None), [x])
    expected, names = model.eval()(x), set(of_functions(model))
    stay = {"conv.conv2d_0_weight", "conv2d_0_weight"} & names  # one is computed, one a buffer
    lq.detach(model, bake=True)
    assert torch.equal(model(x), expected)
    assert set(of_functions(model)) == stay and len(stay) < len(names)
    lq.detach(model)
    assert not is_attached(model) and not any("forward" in vars(m) for m in model.modules())
    for name, parameter in model.named_parameters():
        if name.endswith(("in_proj_weight", "mix")) or "weight_hh" in name:
            rows = parameter.t() if name == "mix" else parameter
            assert max(len(row.unique()) for row in rows.detach()) <= 8


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


# --- export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weights": lq.QuantSpec(3), "first_last": None}, {"activations": None}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_model_is_the_eager_one(options):
    model, x = quantized(**options), images()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(small()(x), model(x), rtol=1e-3)


# --- errors ----------------------------------------------------------------------------------------------------


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
