"""The integers of quantized weights: those of each layer, bit for bit what it multiplies by."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.sites import float_weight, weight_quantizer
from lq.errors import StateError
from lq.structure.channels import ChannelLayout
from tests.attachment.networks import LAYERS, channel, every_layer, layer_and_input
from tests.models import example

GRIDS = {
    "per channel": {},
    "per tensor": {"per_channel": False},
    "asymmetric": {"symmetric": False},
    "asymmetric per tensor": {"symmetric": False, "per_channel": False},
    "powers of two": {"power_of_two": True},
}


def attached(kind, seed=0, **spec):
    """A layer alone, whose name is the empty one, with weights that lie to one side of zero."""
    layer, _ = layer_and_input(kind, seed)
    with torch.no_grad():
        layer.weight.add_(layer.weight.std() / 3)
    return lq.attach(layer, lq.QuantSpec(**{"bits": 4, "signed": True, **spec}), first_last=None)


def assert_right(layer, found):
    """A weight as integers against its definition, channel by channel."""
    used, quantizer = layer.weight.detach(), weight_quantizer(layer)
    assert found.codes.shape == used.shape and found.layout == quantizer.layout
    assert found.codes.dtype == (torch.uint8 if found.bits.max() <= 8 else torch.int32)
    assert found.bits.dtype == torch.int64 and torch.equal(found.bits.float(), quantizer.bits)
    assert found.step.dtype == found.zero_point.dtype == torch.float32
    assert found.step.shape == found.zero_point.shape == quantizer.bits.shape
    assert torch.equal(found.step, quantizer.step)
    back = found.dequantize()
    assert back.dtype == torch.float32 and torch.equal(back.to(used.dtype), used)
    weight, channels = float_weight(layer).detach(), quantizer.layout.channels
    for c, (step, zero, bits) in enumerate(
        zip(*(t.expand(channels).tolist() for t in (found.step, found.zero_point, found.bits)), strict=True)
    ):
        codes = channel(layer, found.codes, c).double()
        assert codes.min() >= 0 and codes.max() <= 2**bits - 1
        torch.testing.assert_close((codes - zero) * step, channel(layer, back, c).double(), rtol=3e-7, atol=1e-30)
        wanted = (channel(layer, weight.float(), c).double() / step + zero).clamp(0, 2**bits - 1)
        assert (codes - wanted).abs().max() < 0.5 + 1e-6 * 2**bits  # the nearest code, but for ties
        assert zero == int(zero) or (bits == 1 and zero == 0.5)


@every_layer
@pytest.mark.parametrize("grid", GRIDS)
def test_every_layer_grid_and_width(kind, grid):
    for bits in (1, 2, 3, 4, 8, 16):
        layer = attached(kind, bits=bits, **GRIDS[grid])
        found = lq.integer_weights(layer)
        assert list(found) == [""]
        assert_right(layer, found[""])
        assert found[""].codes.unique().numel() > 1


@every_layer
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("widths", [(0, 1, 2, 3, 4, 8), (2, 0, 16, 0, 5, 1), (0, 0, 0, 0, 0, 7), (6, 7, 0, 0, 3, 3)])
def test_a_width_for_each_channel_and_pruned_ones(kind, symmetric, widths):
    plain, _ = layer_and_input(kind)
    channels = ChannelLayout.of(plain, plain.weight).channels
    widths = (*widths, 2)[-channels:]
    layer = attached(kind, bits=widths, symmetric=symmetric)
    found = lq.integer_weights(layer)[""]
    assert_right(layer, found)
    assert found.bits.tolist() == list(widths)
    for c, bits in enumerate(widths):
        if bits == 0:
            assert not channel(layer, found.codes, c).any() and not channel(layer, found.dequantize(), c).any()


@every_layer
@pytest.mark.parametrize("bits", [0, 5])
def test_all_channels_pruned_and_none(kind, bits):
    layer = attached(kind, bits=bits)
    found = lq.integer_weights(layer)[""]
    assert_right(layer, found)
    assert bool(found.dequantize().any()) == (bits > 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_any_number_of_channels(symmetric):
    for channels in (1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 65):
        torch.manual_seed(channels)
        layer = lq.attach(nn.Linear(3, channels), 3, first_last=None, symmetric=symmetric)
        assert_right(layer, lq.integer_weights(layer)[""])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_all_codes_are_used(bits, grid):
    """Weights that reach beyond the range at both ends and are close to each other."""
    layer = lq.attach(nn.Linear(4096, 3), lq.QuantSpec(bits, signed=True, range="minmax", **GRIDS[grid]))
    with torch.no_grad():
        float_weight(layer).copy_(torch.linspace(-0.05, 0.05, 4096))
    weight_quantizer(layer).settle(weight_quantizer(layer).bits.clone().fill_(bits))
    found = lq.integer_weights(layer)[""]
    assert_right(layer, found)
    for row in found.codes:
        assert row.unique().tolist() == list(range(2**bits))


def test_16_bits_use_the_highest_and_the_lowest_code():
    layer = lq.attach(nn.Linear(64, 2), lq.QuantSpec(16, symmetric=False, signed=True, range="minmax"), first_last=None)
    found = lq.integer_weights(layer)[""]
    assert found.codes.amin(1).tolist() == [0, 0] and found.codes.amax(1).tolist() == [65535, 65535]


def test_one_bit_has_no_zero_unless_asymmetric():
    for symmetric, expected in ((True, {0.5}), (False, {0.0, 1.0})):
        layer = lq.attach(nn.Linear(16, 8), lq.QuantSpec(1, symmetric=symmetric, signed=True), first_last=None)
        assert set(lq.integer_weights(layer)[""].zero_point.tolist()) <= expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [1, 3, 8, (0, 2, 4, 8, 16, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_types_of_weights(dtype, bits, symmetric):
    torch.manual_seed(0)
    layer = lq.attach(nn.Linear(9, 6).to(dtype), lq.QuantSpec(bits, symmetric=symmetric), first_last=None)
    found = lq.integer_weights(layer)[""]
    assert layer.weight.dtype == dtype
    assert torch.equal(found.dequantize().to(dtype), layer.weight)
    assert_right(layer, found)


def test_names_are_those_of_layers_and_tied_layers_have_one_weight():
    model, _ = example("text")
    lq.attach(model, 3, first_last=None)
    found = lq.integer_weights(model)
    assert list(found) == ["embed", "decode"]
    assert torch.equal(found["embed"].codes, found["decode"].codes)
    assert_right(model.embed, found["embed"])


def test_weights_of_functions_have_the_names_of_their_operands():
    model, x = example("encoder")
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x), first_last=None), [x])
    place = next(p for p in model.layers[0].self_attn.call_quantizers._modules if p.endswith("_weight"))
    weight, quantizer = model.layers[0].self_attn.in_proj_weight, model.layers[0].self_attn.call_quantizers[place]
    found = lq.integer_weights(model)
    integers = found.pop(f"layers.0.self_attn.{place}")
    assert torch.equal(integers.dequantize(), quantizer(weight))
    assert int(integers.codes.max()) <= 15 and integers.codes.shape == weight.shape
    assert all(weight_quantizer(model.get_submodule(name)) is not None for name in found)


def test_weights_that_functions_compute_are_not_among_them():
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x), first_last=None), [x])
    assert set(lq.integer_weights(model)) == {"never_called", "matmul_0_right_weight", "einsum_0_right_weight"}


def test_a_layer_that_is_registered_twice_has_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    found = lq.integer_weights(lq.attach(model, 2, first_last=None))
    assert list(found) == ["0", "2"]
    assert torch.equal(found["0"].codes, found["2"].codes)


def test_activations_alone_have_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lq.calibrate(lq.attach(model, None, 8), [torch.randn(3, 4)])
    assert lq.integer_weights(model) == {}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(training):
    layer = attached("conv2d").train(training)
    lq.set_estimator(layer, "lsq")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    found = lq.integer_weights(layer)[""]
    assert not any(t.requires_grad for t in (found.codes, found.step, found.zero_point, found.bits))
    assert layer.training is training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    for tensor in (found.codes, found.step, found.zero_point, found.bits):
        tensor.zero_()  # is nobody else's
    assert_right(layer, lq.integer_weights(layer)[""])


@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus", "ewgs", "noise_scale"])
def test_after_training_too(estimator):
    torch.manual_seed(0)
    layer = lq.attach(nn.Linear(8, 5), 3, first_last=None, symmetric=False, estimator=estimator)
    before = lq.integer_weights(layer)[""]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        optimizer.step()
    weight_quantizer(layer).refresh()
    found = lq.integer_weights(layer)[""]
    assert not torch.equal(found.dequantize(), before.dequantize())
    assert_right(layer, found)


@pytest.mark.parametrize("zero", [-2.0, 3.4, 5.0, 20.0])
def test_zero_points_that_training_moved_anywhere(zero):
    layer = attached("linear", symmetric=False)
    with torch.no_grad():
        weight_quantizer(layer).zero_point.copy_(torch.tensor([zero, 1.0, 2.5, 3.0, 4.0, 7.6]))
    weight_quantizer(layer).refresh()
    assert_right(layer, lq.integer_weights(layer)[""])


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_model_without_quantizers():
    with pytest.raises(StateError, match=r"lq.integer_weights needs a model with quantizers, Linear has none"):
        lq.integer_weights(nn.Linear(3, 3))


def learned(layer):
    with torch.no_grad():
        weight_quantizer(layer).bits[1] = 3.5


def no_range(layer):
    weight_quantizer(layer).log2_step.data[2] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (learned, r"^weight has widths that are being learned \(\[4.0, 3.5, 4.0\]...\); let the training finish"),
        (no_range, r"^weight has no range yet: run lq.calibrate"),
    ],
)
def test_grids_that_have_no_integers(change, message):
    layer = attached("linear")
    change(layer)
    weight_quantizer(layer).refresh()
    with pytest.raises(StateError, match=message):
        lq.integer_weights(layer)


def test_every_kind_of_layer_is_tested():
    kinds = {type(make()) for make, _ in LAYERS.values()}
    assert {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding} <= kinds
