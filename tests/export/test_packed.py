"""Packed files: what comes back is what was saved, to the bit; what is not saved at all."""

import pytest
import timm
import torch
from torch import nn

import lq
from lq.attachment.sites import float_weight, quantizers, weight_quantizer
from lq.errors import DataError, StateError
from tests.attachment.networks import LAYERS, every_layer, images, layer_and_input, quantized, small
from tests.attachment.test_folding import convnet, norms, randomize
from tests.export.exported import activations, weights
from tests.export.files import QUIETLY, calibrated, round_trip, state
from tests.helpers import assert_same
from tests.models import EXAMPLES, every_model, example

pytestmark = QUIETLY


# --- models -----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "weights": {"weights": weights(3)},
    "weights and activations": {"weights": weights(4), "activations": activations(6)},
    "asymmetric": {"weights": weights(2, symmetric=False), "activations": activations(4), "first_last": None},
    "per tensor": {"weights": weights(3, per_channel=False, symmetric=False), "first_last": None},
    "16 bits": {"weights": weights(16), "activations": activations(16)},
    "1 bit": {"weights": weights(1), "first_last": None},
    "powers of two": {"weights": weights(4, power_of_two=True), "first_last": None},
}

NEVER_CALLED = {"odd weights": "never_called", "control flow": "negative"}


@every_model
@pytest.mark.parametrize("grid", OPTIONS)
def test_every_model_comes_back(kind, grid, tmp_path):
    model, x = example(kind)
    calibrated(model, x, **OPTIONS[grid], exclude=NEVER_CALLED.get(kind))
    round_trip(model, EXAMPLES[kind][0]().eval(), x, tmp_path)


@every_model
@pytest.mark.parametrize("skip", [False, True, "auto"])
def test_everything_that_multiplies_comes_back(kind, skip, tmp_path):
    model, x = example(kind)
    options = {"structure": lq.inspect(model, x), "skip": skip, "share_concats": skip is True}
    calibrated(model, x, weights=weights(4, symmetric=False), activations=activations(5), **options)
    loaded = round_trip(model, EXAMPLES[kind][0]().eval(), x, tmp_path)
    assert kind == "text" or list(loaded.state_dict()) == list(model.state_dict())


TIMM = {
    "test_resnet": {"zero_init_last": False},
    "test_vit": {"img_size": 32},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("structure", [False, True], ids=["layers", "structure"])
def test_timm_models_come_back(name, structure, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return randomize(timm.create_model(name, num_classes=5, **TIMM[name]), seed).eval()

    model, x = build(0), torch.randn(2, 3, 32, 32)
    options = {}
    if structure:
        lq.fold_batchnorm(model)
        options = {"structure": lq.inspect(model, x), "skip": "auto"}
    calibrated(model, x, weights=weights(3), activations=activations(5), **options)
    loaded = round_trip(model, build(1), x, tmp_path)
    assert norms(loaded) == norms(model)
    if name in ("test_resnet", "mobilenetv3_small_050"):
        assert bool(norms(loaded)) is not structure


@every_layer
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_layer_with_pruned_channels_comes_back(kind, symmetric, tmp_path):
    """A layer alone: its name is the empty one."""
    layer, x = layer_and_input(kind)
    lq.attach(layer, weights(4, symmetric=symmetric), first_last=None)
    channels = weight_quantizer(layer).bits.numel()
    widths = [0, 1, 2, 16, 4, 0, 8][:channels]
    lq.set_bits(layer, {"*": widths})
    loaded = round_trip(layer, LAYERS[kind][0](), x, tmp_path)
    assert weight_quantizer(loaded).bits.tolist() == widths
    assert weight_quantizer(loaded).spec.bits == tuple(widths)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_that_are_pruned_away_come_back(per_channel, symmetric, tmp_path):
    spec = lq.QuantSpec(3, per_channel=per_channel, symmetric=symmetric)
    model = calibrated(small(), images(), weights=spec, activations=4)
    lq.set_bits(model, {"2": 0, "5": 0}, {"5.input": 0})
    loaded = round_trip(model, small(1), images(), tmp_path)
    assert not loaded[2].weight.any() and not loaded[5].weight.any()
    assert [q.is_unsigned for q in quantizers(loaded)] == [q.is_unsigned for q in quantizers(model)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_models_of_other_types_come_back(dtype, bits, symmetric, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(33, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype).eval()

    x = torch.randn(4, 33).to(dtype)
    spec = weights(bits, symmetric=symmetric)
    model = calibrated(build(0), x, weights=spec, activations=activations(8), first_last=None)
    loaded = round_trip(model, build(1), x, tmp_path)
    assert float_weight(loaded[0]).dtype == dtype and loaded[2].weight.dtype == dtype


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("folded_before", [True, False])
def test_batchnorms_are_as_they_were_saved(fold, folded_before, tmp_path):
    model, x = convnet(), images(8)
    if fold:
        lq.fold_batchnorm(model)
    else:
        model.train()(x)  # half-trained
    calibrated(model, x, weights=3, activations=5)
    fresh = randomize(convnet(), 5).eval()
    if folded_before and fold:
        lq.fold_batchnorm(fresh)
    loaded = round_trip(model, fresh, x, tmp_path)
    norm = loaded[1]
    assert isinstance(norm, nn.Identity) if fold else int(norm.num_batches_tracked) == 1
    if not fold:
        assert norm.num_batches_tracked.dtype == torch.int64


def test_a_folded_file_into_a_quantized_model_that_is_not_folded_is_another_model(tmp_path):
    model = convnet().eval()
    lq.fold_batchnorm(model)
    lq.save(lq.attach(model, 3), tmp_path / "m.safetensors")
    other = lq.attach(convnet(), 3)
    before = state(other)
    with pytest.raises(DataError, match="it has no 1.bias, 1.num_batches_tracked, 1.running_mean"):
        lq.load(tmp_path / "m.safetensors", other)
    assert_same(state(other), before)


class Activated(nn.Sequential):
    """timm's BatchNorm with an activation that has a parameter of its own."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU), nn.Conv2d(4, 2, 3))


def test_a_batchnorm_with_a_learned_activation_unfolded(tmp_path):
    model, x = randomize(Activated()).eval(), torch.randn(2, 3, 8, 8)
    round_trip(lq.attach(model, 3), Activated().eval(), x, tmp_path)


def test_a_batchnorm_with_a_learned_activation_folded(tmp_path):
    model, x = randomize(Activated()).eval(), torch.randn(2, 3, 8, 8)
    lq.fold_batchnorm(model)
    round_trip(lq.attach(model, 3), Activated().eval(), x, tmp_path)


# --- errors of save ---------------------------------------------------------------------------------------------------


def fractional(model):
    with torch.no_grad():
        weight_quantizer(model[2]).bits[1] = 3.5
    weight_quantizer(model[2]).refresh()


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (small, None, "lq.save needs a model with quantizers, Sequential has none"),
        (lambda: lq.attach(small(), 4, 8), None, "input has no range yet: run lq.calibrate"),
        (quantized, fractional, "2.weight has widths that are being learned"),
    ],
)
def test_models_that_cannot_be_saved(model, change, message, tmp_path):
    made = model()
    if change is not None:
        change(made)
    before = state(made)
    with pytest.raises(StateError, match=message):
        lq.save(made, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    assert before.keys() == made.state_dict().keys()


@pytest.mark.parametrize("name", ["m.pt", "m", "m.safetensors.ckpt", "safetensors", ".safetensors"])
def test_files_of_another_ending(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name} should end in '.safetensors': packed models are safetensors files"):
        lq.save(quantized(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = quantized()
    with torch.no_grad():
        float_weight(model[2])[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        lq.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
