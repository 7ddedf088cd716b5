"""The standard form: the quantized model's own outputs, to the bit, by standard operators, and nothing of lq."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.running import CALLS
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import activation_quantizers, float_weight, input_quantizer, quantizers, weight_quantizer
from lq.errors import StateError
from lq.export.standard import StandardActivation, StandardWeight, standard_form
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from tests.attachment.networks import LAYERS, channel, every_layer, images, layer_and_input, quantized, small
from tests.attachment.test_folding import convnet
from tests.export.exported import activations, calibrated, depthwise, pictures, weights
from tests.helpers import assert_same, hooks
from tests.models import EXAMPLES, every_model, example, state

ORIGINAL = "parametrizations.weight.original"

#: Examples with weights that functions use.
AT_CALLS = ("odd weights", "text", "encoder")


def alike(model, *inputs):
    """Whether the standard form gives what the model gives, to the bit."""
    model.eval()
    made = standard_form(model)
    with torch.no_grad():
        expected, found = model(*inputs), made(*inputs)
    return found.dtype == expected.dtype and torch.equal(found, expected) and bool(expected.isfinite().all())


def of_lq(model):
    """Modules of lq that are not of the standard form: weights at calls keep theirs, told what to do instead."""
    return [module for module in model.modules() if isinstance(module, (Quantizer, SharedQuantizer))]


# --- models -----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_every_model_and_width(kind, bits):
    model, x = example(kind)
    options = {"first_last": None, "skip": "auto", "integer": True}
    calibrated(model, x, weights=weights(bits), activations=activations(bits), **options)
    assert alike(model, x)
    assert alike(model, EXAMPLES[kind][1].flip(0))
    made = standard_form(model)
    assert of_lq(made) == []
    assert any(isinstance(m, StandardWeight) for m in made.modules())
    assert any(isinstance(m, StandardActivation) for m in made.modules())


NEVER_CALLED = {"odd weights": "never_called", "control flow": "negative"}


@every_model
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("structure", [True, False], ids=["structure", "layers"])
def test_every_model_with_zero_points(kind, bits, structure):
    model, x = example(kind)
    options = {} if structure else {"exclude": NEVER_CALLED.get(kind)}
    spec = weights(bits, symmetric=False, signed=None)
    calibrated(model, x, structure=structure, weights=spec, activations=activations(bits), first_last=None, **options)
    assert alike(model, x)


@pytest.mark.parametrize("kind", ["block", "residual", "u-net"])
def test_ranges_of_all_rules_and_learned_ones(kind):
    for rule in ("auto", "percentile", "lp", "lsq"):
        model, x = example(kind)
        spec = lq.QuantSpec(3, per_channel=False, symmetric=False, range=rule)
        calibrated(model, x, weights=lq.QuantSpec(3, range=rule, signed=True), activations=spec, estimator="lsq")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(x).square().mean().backward()
        optimizer.step()
        assert alike(model, x)


@pytest.mark.parametrize("options", [{"power_of_two": True}, {"per_channel": False}, {"symmetric": False}])
def test_other_grids_of_weights(options):
    for bits in (2, 4, 8):
        model = calibrated(small(), images(), weights=weights(bits, **options), activations=activations(4))
        assert alike(model, images())


@pytest.mark.parametrize("symmetric", [True, False])
def test_16_bits_with_one_step(symmetric):
    spec = weights(16, per_channel=False, symmetric=symmetric)
    assert alike(calibrated(small(), images(), weights=spec, activations=activations(16)), images())


def test_16_bits_with_zero_points_by_channel():
    spec = weights(16, symmetric=False)
    assert alike(calibrated(small(), images(), weights=spec, activations=activations(16)), images())


def test_depthwise_convolutions():
    model, x = depthwise(), pictures()
    assert alike(calibrated(model, x, weights=weights(4), activations=activations(4)), x)


# --- layers -----------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("widths", [[0, 1, 2, 16, 4, 0, 8], [3, 2, 0, 1, 4, 8, 5], [1] * 7, [0] * 7, [2, 1, 0] * 3])
def test_widths_by_channel_with_pruned_ones(kind, widths):
    layer, x = layer_and_input(kind)
    lq.attach(layer, lq.QuantSpec(4, signed=True), first_last=None)
    channels = weight_quantizer(layer).bits.numel()
    widths = [*widths, 3][:channels]
    lq.set_bits(layer, {"*": widths})
    assert alike(nn.Sequential(layer), x)
    used = weight_of(standard_form(layer))
    for c, bits in enumerate(widths):
        assert bool(channel(layer, used, c).any()) == (bits > 0)


def weight_of(layer):
    """The weight that a layer of the standard form uses."""
    return layer.weight.detach()


@every_layer
@pytest.mark.parametrize("widths", [[0, 1, 2, 3, 4, 0, 8], [5, 2, 0, 1, 4, 8, 5], [1] * 7, [0] * 7])
def test_widths_by_channel_and_zero_points(kind, widths):
    layer, x = layer_and_input(kind)
    lq.attach(layer, lq.QuantSpec(4, symmetric=False), first_last=None)
    lq.set_bits(layer, {"*": widths[: weight_quantizer(layer).bits.numel()]})
    assert alike(nn.Sequential(layer), x)


@every_layer
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_compute_with_the_weights_of_integer_weights(kind, symmetric):
    layer, _ = layer_and_input(kind)
    lq.attach(layer.eval(), lq.QuantSpec(3, symmetric=symmetric), first_last=None)
    assert torch.equal(weight_of(standard_form(layer)), lq.integer_weights(layer)[""].dequantize())


def test_integer_types():
    wanted = {
        (True, 1): torch.int8, (True, 2): torch.int8, (True, 4): torch.int8, (True, 8): torch.int8,
        (True, 16): torch.int16, (False, 1): torch.uint8, (False, 4): torch.uint8, (False, 8): torch.uint8,
    }  # fmt: skip
    for (symmetric, bits), dtype in wanted.items():
        torch.manual_seed(0)
        made = standard_form(lq.attach(nn.Linear(8, 4), bits, symmetric=symmetric, first_last=None))
        levels, parts = made.parametrizations.weight.original, made.parametrizations.weight[0]
        assert levels.dtype == dtype
        assert parts.step.dtype == torch.float32 and parts.zero_point.dtype == torch.int64
        assert parts.step.shape == parts.zero_point.shape == (4,)
        assert symmetric == (not parts.zero_point.any())
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        if symmetric and bits == 1:
            low, high = -1, 1
            assert set(levels.unique().tolist()) == {-1, 1}
        assert low <= int(levels.min()) < int(levels.max()) <= high


def test_two_levels_are_plus_and_minus_half_a_step():
    layer = lq.attach(nn.Linear(8, 4), 1, first_last=None)
    parts = standard_form(layer).parametrizations.weight[0]
    assert torch.equal(parts.step, weight_quantizer(layer).step / 2)


def test_two_level_channels_beside_channels_with_zero_points():
    """As only a state from elsewhere can have them."""
    layer = lq.attach(nn.Linear(8, 2), lq.QuantSpec((1, 4), signed=True), first_last=None)
    with torch.no_grad():
        weight_quantizer(layer).zero_point.copy_(torch.tensor([0.5, 3.0]))
    weight_quantizer(layer).refresh()
    assert alike(layer, torch.randn(5, 8))


@pytest.mark.parametrize("zero", [-2.0, 20.0, 300.0])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_far_from_zero(zero, per_channel):
    """LSQ+ may move a zero point out of the grid, where operators have no codes."""
    layer = lq.attach(nn.Linear(8, 3), weights(4, symmetric=False, per_channel=per_channel), first_last=None)
    with torch.no_grad():
        weight_quantizer(layer).zero_point.view(-1)[0] = zero
    weight_quantizer(layer).refresh()
    assert alike(layer, torch.randn(5, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_models_of_other_types(dtype, bits, symmetric):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)
    x = torch.randn(4, 33).to(dtype)
    spec = weights(bits, symmetric=symmetric)
    calibrated(model, x, structure=False, weights=spec, activations=activations(bits), first_last=None)
    assert alike(model, x)
    made = standard_form(model)
    assert made[0].weight.dtype == dtype and made[0].parametrizations.weight[0].step.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_and_functions_of_other_types(dtype):
    for kind in ("block", "unfused block", "encoder", "odd weights"):
        model, x = example(kind)
        model, x = model.to(dtype), x.to(dtype)
        assert alike(calibrated(model, x, weights=weights(4), activations=activations(6)), x)


# --- activations ------------------------------------------------------------------------------------------------------


def activation_quantizer(bits, step, zero_point, symmetric=False):
    made = ActivationQuantizer(lq.QuantSpec(bits, per_channel=False, symmetric=symmetric), "a")
    with torch.no_grad():
        made.log2_step.copy_(torch.log2(torch.tensor(step)))
        made.zero_point.fill_(zero_point)
    made.refresh()
    return made.eval()


def values(quantizer, seed, dtype=torch.float32):
    """Values of all levels, beyond them, and halfway between two."""
    generator = torch.Generator().manual_seed(seed)
    step = quantizer.step.detach()
    ties = (torch.arange(-300, 300) / 2) * step
    found = [torch.randn(500, generator=generator) * step * 2 ** float(quantizer.bits), ties, torch.tensor([1e4, -1e4])]
    return torch.cat(found).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_activations_are_rounded_as_by_their_quantizers(bits, dtype):
    standard_form(quantized())  # registers the operators
    generator = torch.Generator().manual_seed(bits)
    middle = 0.5 if bits == 1 else 2 ** (bits - 1)
    grids = [(0.0, False), (0.0, True)] if bits == 0 else [(0.0, False), (middle, True), (2**bits - 1.0, False)]
    for zero_point, symmetric in [*grids, *([(1.0, False), (4.4, False)] if bits > 2 else [])]:
        for seed in range(5):
            step = float(10 ** (torch.rand((), generator=generator) * 6 - 5))
            quantizer = activation_quantizer(bits, step, zero_point, symmetric)
            x = values(quantizer, seed, dtype)
            found = StandardActivation(quantizer)(x)
            assert found.dtype == dtype and torch.equal(found, quantizer(x))
            assert found.unique().numel() <= 2**bits


@torch.no_grad()
def test_activations_of_two_levels_have_no_zero():
    quantizer = activation_quantizer(1, 0.5, 0.5, symmetric=True)
    found = StandardActivation(quantizer)(torch.tensor([-3.0, -0.1, 0.1, 3.0]))
    assert found.tolist() == [-0.25, -0.25, 0.25, 0.25]


@pytest.mark.parametrize("zero", [-2.0, -0.4, 17.0, 300.0])
@torch.no_grad()
def test_activations_far_from_zero(zero):
    """LSQ+ may move a zero point out of the grid: all levels lie above zero, or below."""
    standard_form(quantized())
    for step in (0.25, 0.3, 0.001):
        quantizer = activation_quantizer(4, step, zero)
        x = torch.linspace(-round(zero) - 5, 20 - round(zero), 400) * quantizer.step
        expected, found = quantizer(x), StandardActivation(quantizer)(x)
        assert expected.unique().numel() == 16
        assert torch.equal(found, expected) or step != 0.25
        same = (found - expected).abs() < 0.5 * step  # but for values beside the middle of two levels
        assert same.float().mean() > 0.95
        torch.testing.assert_close(found[same], expected[same], rtol=1e-5, atol=step * 1e-4)


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_share_its_quantizer():
    model, x = example("block")
    calibrated(model, x, weights=weights(4), activations=activations(4))
    made = standard_form(model)
    assert isinstance(model.attn.k.input_quantizer, SharedQuantizer)
    assert made.attn.q.input_quantizer is made.attn.k.input_quantizer is made.attn.v.input_quantizer
    assert made.attn.q.input_quantizer is not made.attn.proj.input_quantizer


def test_concatenations_share_their_quantizer():
    model, x = example("u-net")
    calibrated(model, x, weights=weights(4), activations=activations(4), skip=True, share_concats=True, first_last=None)
    assert any(isinstance(m, SharedQuantizer) for m in model.modules())
    assert alike(model, x)


def test_quantizers_of_calls_are_shared_too():
    """Keys and values of one tensor."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            x = self.fc(x)
            return F.scaled_dot_product_attention(x, x, x)

    torch.manual_seed(0)
    model, x = Same(), torch.randn(2, 5, 8)
    calibrated(model, x, weights=weights(8), activations=activations(8), first_last=None)
    assert alike(model, x)
    assert of_lq(standard_form(model)) == []


def test_tied_weights_are_stored_once():
    model, x = example("text")
    calibrated(model, x, weights=weights(4), activations=activations(8))
    made = standard_form(model)
    assert made.embed.parametrizations.weight.original is made.decode.parametrizations.weight.original
    assert made.embed.parametrizations.weight[0] is made.decode.parametrizations.weight[0]
    with torch.no_grad():
        assert torch.equal(made(x), model(x))


def test_a_layer_that_is_registered_twice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    x = torch.randn(3, 4)
    assert alike(calibrated(model, x, structure=False, weights=weights(3), activations=activations(4)), x)
    made = standard_form(model)
    assert made[0] is made[2]


# --- weights of functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AT_CALLS)
@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"symmetric": False}, {"power_of_two": True}])
def test_weights_of_functions(kind, options):
    model, x = example(kind)
    calibrated(model, x, weights=weights(4, **options), activations=activations(8))
    assert alike(model, x)


#: Parameters that functions use, of each example; those that stay float are computed first, or fixed.
OF_FUNCTIONS = {
    "odd weights": {"mix", "expand"},
    "text": {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_ih_l1", "lstm.weight_hh_l1"},
    "encoder": {f"layers.{i}.self_attn.in_proj_weight" for i in range(9)},
}


@pytest.mark.parametrize("kind", AT_CALLS)
def test_integers_take_the_place_of_the_parameters_of_functions(kind):
    model, x = example(kind)
    gone = {name for name, _ in model.named_parameters() if name in OF_FUNCTIONS[kind]}
    values = {name: model.get_parameter(name).numel() for name in gone}
    calibrated(model, x, weights=weights(4), activations=activations(8))
    made = standard_form(model)
    state = made.state_dict()
    assert gone and not gone & set(state)
    levels = {name: t for name, t in state.items() if CALLS in name and name.endswith(".levels")}
    assert sum(t.numel() for t in levels.values()) == sum(values.values())
    assert {t.dtype for t in levels.values()} == {torch.int8}
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for m in made.modules() for t in vars(m).values()
            if isinstance(t, torch.Tensor) and t.is_floating_point()}  # fmt: skip
    assert max(held.values(), default=0) <= 8  # what is left in their places is one number


@pytest.mark.parametrize("widths", [[2, 4], [0, 16], [1, 3]])
def test_weights_of_functions_with_widths_by_channel(widths):
    for kind, call in (("encoder", "linear_0_weight"), ("odd weights", "conv.conv2d_0_weight")):
        model, x = example(kind)
        calibrated(model, x, weights=weights(4), activations=activations(8))
        found = next(q for q in quantizers(model) if isinstance(q, WeightQuantizer) and call in q.name)
        lq.set_bits(model, {found.name: widths * (found.bits.numel() // 2)})
        model(x)
        assert alike(model, x)


def test_weights_of_functions_without_a_range():
    model, x = example("encoder")
    lq.attach(model, weights(4), activations(8), structure=lq.inspect(model, x))
    found = next(q for q in quantizers(model) if isinstance(q, WeightQuantizer) and "linear_0_weight" in q.name)
    lq.calibrate(model, [x])
    found.forget_range()
    with pytest.raises(StateError, match=rf"{found.name} has no range yet: run lq.calibrate\(model, batches\) first"):
        standard_form(model)


# --- the model itself -------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is_and_trains(kind, training):
    model, x = example(kind)
    options = {"weights": weights(4), "activations": activations(6), "skip": "auto", "estimator": "lsq"}
    calibrated(model, x, **options)
    model.train(training)
    before, expected, left = state(model), model.eval()(x), hooks(model)
    model.train(training)
    identities = [id(p) for p in model.parameters()]
    made = standard_form(model)
    assert not made.training and model.training is training
    assert not any(p.requires_grad for p in made.parameters())
    with torch.no_grad():  # nothing of the copy is the model's
        made(x)
        for value in [*made.parameters(), *made.buffers()]:
            value.zero_()
    assert [id(p) for p in model.parameters()] == identities
    assert_same(state(model), before)
    assert hooks(model) == left
    assert torch.equal(model.eval()(x), expected)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    moved = [p for p in model.parameters() if p.grad is not None and bool(p.grad.any())]
    assert len(moved) > 4 and all(p.grad.isfinite().all() for p in moved)
    optimizer.step()
    assert not torch.equal(model.eval()(x), expected)
    assert alike(model, x)


def test_training_later_does_not_reach_the_copy():
    model = quantized()
    made, x = standard_form(model), images()
    with torch.no_grad():
        expected = made(x)
        float_weight(model[0]).zero_()
        input_quantizer(model[2]).log2_step.add_(1)
        assert torch.equal(made(x), expected)


def test_a_model_in_training_mode_is_exported_in_eval_mode():
    torch.manual_seed(0)
    model = convnet()
    model.insert(3, nn.Dropout(0.5))
    x = images(8)
    calibrated(model, x, weights=weights(4), activations=activations(6))
    with torch.no_grad():
        expected = model(x)
        made = standard_form(model.train())
        assert torch.equal(made(x), expected)
    assert model.training


def test_copies_of_a_standard_form():
    made, x = standard_form(quantized()), images()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(made)(x), made(x))
        assert torch.equal(quantized()(x), made(x))


def test_weights_alone_activations_alone_and_pruned_layers():
    model = calibrated(small(), images(), structure=False, weights=weights(4), activations=None)
    assert alike(model, images()) and not any(isinstance(m, StandardActivation) for m in standard_form(model).modules())
    model = calibrated(small(), images(), structure=False, weights=None, activations=activations(4))
    assert alike(model, images()) and not any(isinstance(m, StandardWeight) for m in standard_form(model).modules())
    model = calibrated(small(), images(), structure=False, weights=weights(4), activations=activations(4))
    lq.set_bits(model, {"2": 0, "6": 0}, {"5.input": 0})
    assert alike(model, images())
    assert all(q.calibrated for q in activation_quantizers(model).values())


def test_a_layer_alone():
    layer, x = layer_and_input("linear")
    assert alike(lq.calibrate(lq.attach(layer, 4, 8, first_last=None), [x]), x)


# --- errors -----------------------------------------------------------------------------------------------------------


def learned(model):
    with torch.no_grad():
        weight_quantizer(model[2]).bits[1] = 3.5
    weight_quantizer(model[2]).refresh()


def learned_activation(model):
    with torch.no_grad():
        input_quantizer(model[2]).bits.fill_(3.5)
    input_quantizer(model[2]).refresh()


def no_range(model):
    lq.detach(model)
    lq.attach(model, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (learned, r"^2.weight has widths that are being learned \(\[4.0, 3.5, 4.0\]...\)"),
        (learned_activation, r"^2.input has widths that are being learned \(\[3.5\]...\)"),
        (no_range, r"^2.input has no range yet: run lq.calibrate\(model, batches\) first"),
        (lq.detach, "^export needs a model with quantizers, Sequential has none; call lq.attach"),
    ],
)
def test_models_that_have_no_standard_form(change, message):
    model = quantized()
    change(model)
    before = state(model)
    with pytest.raises(StateError, match=message):
        standard_form(model)
    assert all(torch.equal(value, before[key]) or value.isnan().any() for key, value in model.state_dict().items())


def test_every_kind_of_layer_is_tested():
    assert {"transposed2d in groups", "conv2d in groups", "embedding"} <= set(LAYERS)
