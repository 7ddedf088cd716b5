"""Packed files: what comes back is what was saved, to the bit, and it takes no more than its widths."""

import copy

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import lq
from lq.attachment.sites import float_weight, input_quantizer, quantizers, weight_quantizer
from lq.callbacks import FineTune, LearnNoiseScale, Quantize
from lq.errors import DataError, StateError
from lq.export.integers import settled_zero_point
from tests.attachment.test_attach import LAYERS, every_layer, images, layer_and_input, quantized, small
from tests.attachment.test_folding import convnet, norms, randomize
from tests.export.files import grids, integers, parse, quantizers_by_key, round_trip, state
from tests.helpers import QUIET, Tiny, assert_same, fit, steps, tiny
from tests.models import EXAMPLES, every_model, example

#: Some examples have weights that functions compute; a test below is about what is said of them.
TOLD = "ignore:.*weights of functions are stored in float"
pytestmark = [pytest.mark.filterwarnings(text) for text in (*QUIET, TOLD)]

every_example = every_model


def weights(bits, **options):
    """Quick to find the ranges of."""
    return lq.QuantSpec(bits, range="minmax", signed=True, **options)


def activations(bits):
    return lq.QuantSpec(bits, per_channel=False, symmetric=False, range="minmax")


def calibrated(model, x, **options):
    return lq.calibrate(lq.attach(model, **options), [x]).eval()


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


@every_example
@pytest.mark.parametrize("grid", OPTIONS)
def test_every_model_comes_back(kind, grid, tmp_path):
    model, x = example(kind)
    calibrated(model, x, **OPTIONS[grid], exclude=NEVER_CALLED.get(kind))
    round_trip(model, EXAMPLES[kind][0]().eval(), x, tmp_path)


@every_example
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


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_tied_weights_are_tied_and_stored_once(tmp_path):
    model, x = example("text")
    alone = copy.deepcopy(model)
    calibrated(model, x, weights=3, activations=6, first_last=None)
    loaded = round_trip(model, EXAMPLES["text"][0]().eval(), x, tmp_path)
    assert float_weight(loaded.embed) is float_weight(loaded.decode)
    assert weight_quantizer(loaded.embed) is weight_quantizer(loaded.decode)
    alone.decode.weight = nn.Parameter(alone.decode.weight.detach().clone())
    calibrated(alone, x, weights=3, activations=6, first_last=None)
    apart, together = lq.save(alone, tmp_path / "apart.safetensors"), (tmp_path / "model.safetensors").stat().st_size
    assert apart - together > (11 * 8 * 3) // 8 + 11 * 4 - 60


class Tied(nn.Module):
    """An embedding and a decoder of one weight, in either order."""

    def __init__(self, decoder_first):
        super().__init__()
        for name in ("decode", "embed") if decoder_first else ("embed", "decode"):
            setattr(self, name, nn.Linear(8, 11, bias=False) if name == "decode" else nn.Embedding(11, 8))
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return self.decode(self.embed(x))


def tied_round_trip(decoder_first, folder, **options):
    torch.manual_seed(0)
    model, x = Tied(decoder_first).eval(), torch.arange(11)
    lq.attach(model, **{"weights": 2, "first_last": None, **options})
    return round_trip(model, Tied(decoder_first).eval(), x, folder)


@pytest.mark.parametrize("decoder_first", [True, False])
def test_tied_weights_in_either_order(decoder_first, tmp_path):
    loaded = tied_round_trip(decoder_first, tmp_path)
    assert float_weight(loaded.embed) is float_weight(loaded.decode)


@pytest.mark.parametrize("decoder_first", [True, False])
def test_tied_weights_of_which_the_later_layer_is_quantized(decoder_first, tmp_path):
    tied_round_trip(decoder_first, tmp_path, exclude="decode" if decoder_first else "embed")


@pytest.mark.parametrize("decoder_first", [True, False])
def test_tied_weights_of_which_the_first_layer_is_quantized(decoder_first, tmp_path):
    tied_round_trip(decoder_first, tmp_path, exclude="embed" if decoder_first else "decode")


@pytest.mark.parametrize("decoder_first", [True, False])
def test_tied_weights_of_several_widths(decoder_first, tmp_path):
    wide = "embed" if decoder_first else "decode"
    tied_round_trip(decoder_first, tmp_path, overrides={wide: {"weights": 8}})


def test_a_layer_under_two_names_comes_back(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(6))
        return model.extend([model[0], model[2]]).eval()

    torch.manual_seed(0)
    x = torch.randn(5, 6)
    model = calibrated(build(), x, weights=3, activations=4, first_last=None)
    loaded = round_trip(model, build(), x, tmp_path)
    assert loaded[0] is loaded[3] and weight_quantizer(loaded[0]) is weight_quantizer(loaded[3])
    assert len(quantizers_by_key(loaded)) == 2 * len(list(quantizers(loaded)))


def test_quantizers_of_activations_that_several_read_are_shared(tmp_path):
    model, x = example("block")
    calibrated(model, x, weights=4, activations=5, structure=lq.inspect(model, x))
    loaded = round_trip(model, EXAMPLES["block"][0]().eval(), x, tmp_path)
    shared = [input_quantizer(getattr(loaded.attn, name)) for name in "qkv"]
    assert shared[0] is shared[1] is shared[2]
    assert [k for k in loaded.state_dict() if k.endswith("_extra_state")]


@pytest.mark.parametrize("kind", ["text", "encoder"])
@pytest.mark.parametrize("spec", [3, lq.QuantSpec(5, per_channel=False), lq.QuantSpec(4, symmetric=False), 16, 1, 0])
def test_weights_of_functions_come_back(kind, spec, tmp_path):
    model, x = example(kind)
    calibrated(model, x, weights=spec, activations=6, structure=lq.inspect(model, x), first_last=None)
    at_calls = {k: q for k, q in quantizers_by_key(model).items() if "call_quantizers" in k and q.is_weight}
    assert at_calls
    loaded = round_trip(model, EXAMPLES[kind][0]().eval(), x, tmp_path)
    for key, quantizer in at_calls.items():
        found = quantizers_by_key(loaded)[key]
        assert torch.equal(found.step.where(found.bits > 0, 0), quantizer.step.where(quantizer.bits > 0, 0))
        assert found.spec.per_channel == quantizer.spec.per_channel
        assert found.source == quantizer.source
    names = [name for name, _ in model.named_parameters() if "in_proj_weight" in name or "weight_ih" in name]
    levels = 2 ** int(next(iter(at_calls.values())).bits.max())
    assert names and all(len(loaded.get_parameter(name)[0].unique()) <= levels for name in names)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class ByThreeParts(nn.Module):
    """Attention in which queries, keys and values are parts of one parameter, each with a grid of its own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(192, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, 2 * x, 3 * x)[0]


@pytest.mark.parametrize(
    ("build", "shape", "values"),
    [(Recurrent, (8, 6, 64), 512 * 192 + 640), (ByThreeParts, (2, 5, 192), 192 * 192 * 4)],
)
def test_files_have_the_size_of_the_widths_of_functions(build, shape, values, tmp_path):
    """Codes of four bits, a step for each row and the biases, and hardly more; the summary says so, too."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    rows = sum(len(p) for p in model.parameters() if p.ndim == 2)
    biases = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    calibrated(model, x, weights=4, structure=lq.inspect(model, x), first_last=None)
    size = lq.save(model, tmp_path / "m.safetensors")
    expected = values * 4 // 8 + 4 * rows + 4 * biases
    assert expected < size < expected + 600
    assert abs(lq.summary(model).bytes - size) < 0.01 * size
    assert lq.summary(model).average_bits == 4


def test_parts_of_a_parameter_have_grids_of_their_own(tmp_path):
    torch.manual_seed(0)
    model, x = ByThreeParts().eval(), torch.randn(2, 5, 192)
    calibrated(model, x, weights=4, activations=8, structure=lq.inspect(model, x), first_last=None)
    lq.set_bits(model, {"attention.linear_0": 2, "attention.linear_1": [0, 3, 8] * 64, "attention.linear_2": 16})
    loaded = round_trip(model, ByThreeParts().eval(), x, tmp_path)
    query, key, value = loaded.attention.in_proj_weight.detach().chunk(3)
    assert max(len(row.unique()) for row in query) <= 4 and not key[::3].any()
    assert torch.equal(value, loaded.attention.in_proj_weight[-192:])


def test_files_get_the_oldest_format_that_they_can_have(tmp_path):
    """So that an lq that does not know weights of functions reads all files but those that have some."""
    torch.manual_seed(0)
    plain = lq.attach(nn.Sequential(nn.Linear(4, 4)), 4)
    model, x = example("encoder")
    calibrated(model, x, weights=4, structure=lq.inspect(model, x))
    for part, version in ((plain, "1"), (model, "2")):
        lq.save(part, tmp_path / "m.safetensors")
        with safe_open(tmp_path / "m.safetensors", "np") as file:
            assert file.metadata()["format"] == f"lq packed {version}"


def test_parameters_that_stay_float_are_named(tmp_path):
    model, x = example("odd weights")
    calibrated(model, x, weights=4, structure=lq.inspect(model, x), first_last=None)
    with pytest.warns(UserWarning, match=r"2 weights of functions are stored in float: .*conv\.conv2d_0_weight \("):
        lq.save(model, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", EXAMPLES["odd weights"][0]().eval())
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.conv.weight, model.conv.weight) and not torch.equal(loaded.mix, model.mix)


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_specs_say_how_quantizers_were_made(symmetric, tmp_path):
    model = quantized(weights=3, symmetric=symmetric, first_last=None)
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    for mine, theirs in zip(quantizers(model), quantizers(loaded), strict=True):
        assert theirs.spec.symmetric is mine.spec.symmetric is (symmetric and mine.is_weight)
        assert (theirs.spec.bits, theirs.spec.per_channel) == (mine.spec.bits, mine.spec.per_channel)
    lq.set_bits(loaded, {"*": 2})
    zeros = torch.cat([settled_zero_point(q) for q in quantizers(loaded) if q.is_weight])
    assert bool((zeros == 2).all()) is symmetric  # ranges that are found anew are of the kind


def test_a_model_that_came_from_a_state_dict_comes_back(tmp_path):
    """Its quantizers do not know how they were made."""
    model = lq.load(quantized(symmetric=False, weights=3).state_dict(), small(9)).eval()
    assert all(q.spec is None for q in quantizers(model))
    round_trip(model, small(1).eval(), images(), tmp_path)


def test_weights_that_are_never_negative_find_ranges_like_before(tmp_path):
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.abs_()
    model = lq.attach(nn.Sequential(layer), 4, first_last=None)
    lq.save(model, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(8, 4)))
    for part in (model, loaded):
        lq.set_bits(part, {"0": 3})
    assert torch.equal(weight_quantizer(loaded[0]).zero_point, weight_quantizer(model[0]).zero_point)


@pytest.mark.parametrize("between", [nn.ReLU, nn.Tanh])
def test_activations_of_a_fixed_zero_come_back(between, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), between(), nn.Linear(6, 3)).eval()

    x, spec = torch.randn(16, 6), lq.QuantSpec(4, per_channel=False)
    loaded = round_trip(calibrated(build(0), x, weights=4, activations=spec), build(1), x, tmp_path)
    assert input_quantizer(loaded[2]).spec.symmetric
    assert float(input_quantizer(loaded[2]).zero_point) == (0 if between is nn.ReLU else 128)


def test_weights_in_another_memory_format_come_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2))
        return model.to(memory_format=torch.channels_last).eval()

    x = torch.randn(2, 3, 8, 8)
    round_trip(calibrated(build(0), x, weights=3, activations=4), build(1), x, tmp_path)


def test_layers_with_parametrizations_of_others_come_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        second = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        return nn.Sequential(first, second, nn.Linear(6, 3)).eval()

    round_trip(lq.attach(build(0), 3), build(1), torch.randn(4, 6), tmp_path)


@pytest.mark.parametrize("zero", [-70000.0, -300.0, -3.0, 0.3, 2.5, 3.5, 127.4, 255.0, 256.0, 32768.0, 65535.0])
@pytest.mark.parametrize("bits", [3, 16])
def test_zero_points_of_any_size(zero, bits, tmp_path):
    model = calibrated(small(), images(), weights=weights(4), activations=activations(bits), first_last=None)
    quantizer = input_quantizer(model[6])
    with torch.no_grad():
        quantizer.zero_point.fill_(zero)
    quantizer.refresh()
    lq.set_estimator(model, "lsq_plus")
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    assert float(settled_zero_point(input_quantizer(loaded[6]))) == round(zero)


def test_learned_zero_points_come_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 3)).eval()

    x = torch.randn(32, 6)
    model = calibrated(build(0), x, weights=4, activations=3, symmetric=False, first_last=None, estimator="lsq_plus")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for quantizer in quantizers(model):
        quantizer.refresh()
    moved = [not torch.equal(q.zero_point, q.zero_point.round()) for q in quantizers(model)]
    assert any(moved[i] for i, q in enumerate(quantizers(model)) if q.is_weight)
    assert any(moved[i] for i, q in enumerate(quantizers(model)) if not q.is_weight)
    round_trip(model, build(1), x, tmp_path)


def test_learned_widths_come_back_once_they_are_settled(tmp_path):
    module = tiny()
    fit(module, [Quantize(8, 8, fold_bn=False), LearnNoiseScale(3, 3, until=0.5, quantizer_lr=0.1)], max_epochs=2)
    assert {3.0, 8.0} <= {float(b) for q in quantizers(module) for b in q.bits.detach().flatten()}
    round_trip(module.eval(), tiny(3).eval(), torch.randn(4, 1, 6, 6), tmp_path)


def test_widths_for_channels_that_are_learned_and_pruned_come_back(tmp_path):
    module = tiny()
    fit(
        module,
        [Quantize(8, 8, fold_bn=False), LearnNoiseScale(2, 4, first_last=None, until=0.5, quantizer_lr=0.3)],
        max_epochs=2,
    )
    round_trip(module.eval(), tiny(3).eval(), torch.randn(4, 1, 6, 6), tmp_path)


def test_activations_alone_come_back(tmp_path):
    model = quantized(weights=None, activations=4)
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    assert weight_quantizer(loaded[2]) is None


def test_a_model_with_baked_weights_comes_back(tmp_path):
    model = lq.detach(quantized(weights=3, activations=4), bake=True)
    loaded = round_trip(model, small(9).eval(), images(), tmp_path)
    assert torch.equal(loaded[2].weight, model[2].weight)


# --- what else a model has --------------------------------------------------------------------------------------------


class Extra(nn.Module):
    """A layer beside a buffer or some other state."""

    def __init__(self, buffer=None, extra=None):
        super().__init__()
        self.layer, self.more = nn.Linear(4, 4), extra
        self.register_buffer("buffer", None if buffer is None else buffer.clone())

    def get_extra_state(self):
        return torch.zeros(1) if self.more is None else self.more

    def set_extra_state(self, state):
        self.more = state

    def forward(self, x):
        return self.layer(x)


BUFFERS = {
    "int64": torch.tensor([2**62, -1]),
    "int64 scalar": torch.tensor(7),
    "int32": torch.arange(6, dtype=torch.int32).view(2, 3),
    "uint8": torch.tensor([[0, 255]], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.tensor([1.5, -3.0], dtype=torch.bfloat16),
    "part of another": torch.arange(6.0)[::2],
    "float64": torch.tensor([0.1], dtype=torch.float64),
    "complex": torch.tensor([1 + 2j]),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "not finite": torch.tensor([float("inf"), float("-inf"), -0.0]),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_come_back_as_they_are(kind, tmp_path):
    buffer = BUFFERS[kind]
    loaded = round_trip(lq.attach(Extra(buffer), 3), Extra(torch.zeros_like(buffer)), torch.randn(2, 4), tmp_path)
    assert torch.equal(loaded.buffer, buffer) and loaded.buffer.dtype == buffer.dtype


@pytest.mark.parametrize("buffer", [torch.empty(0), torch.empty(0, 3, dtype=torch.int64)], ids=["float", "int"])
def test_buffers_without_values(buffer, tmp_path):
    round_trip(lq.attach(Extra(buffer), 3), Extra(buffer), torch.randn(2, 4), tmp_path)


@pytest.mark.parametrize(
    "extra", [torch.tensor([0, 200, 3], dtype=torch.uint8), torch.tensor([], dtype=torch.uint8), torch.ones(2, 2)]
)
def test_extra_states_that_are_tensors(extra, tmp_path):
    loaded = round_trip(lq.attach(Extra(extra=extra), 3), Extra(), torch.randn(2, 4), tmp_path)
    assert torch.equal(loaded.more, extra)


@pytest.mark.parametrize("extra", [torch.tensor(3, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.uint8)], ids=str)
def test_extra_states_of_bytes_that_are_no_list(extra, tmp_path):
    loaded = round_trip(lq.attach(Extra(extra=extra), 3), Extra(), torch.randn(2, 4), tmp_path)
    assert torch.equal(loaded.more, extra)


def test_states_that_are_no_tensors_are_an_error(tmp_path):
    model = lq.attach(nn.Sequential(Extra(extra={"steps": 3})), 3)
    with pytest.raises(DataError, match="0._extra_state is a dict; a packed file holds tensors only"):
        lq.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


class Named(nn.Module):
    """Two layers of given names."""

    def __init__(self, names):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        return x


ODD = [("a:w", "b:i"), ("a/b", "c,d"), ("größe", "層"), ("weight", "input"), (" ", '"'), ("bits", "log2_step")]


@pytest.mark.parametrize("names", ODD, ids=str)
def test_layers_of_odd_names(names, tmp_path):
    torch.manual_seed(0)
    model = calibrated(Named(names), x := torch.randn(3, 4), weights=3, activations=4)
    round_trip(model, Named(names), x, tmp_path)


def test_a_line_end_in_a_name_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"'parts.a\\nb.bias' has a line end in its name; rename the module"):
        lq.save(lq.attach(Named(["a\nb"]), 3), tmp_path / "m.safetensors")


# --- into what a file is loaded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"weights": 3, "activations": 4},
        {"weights": 8, "activations": 2, "first_last": None},
        {"weights": 2, "symmetric": False},
        {"weights": None, "activations": 8},
        {"weights": 4, "exclude": "5", "estimator": "lsq_plus"},
    ],
    ids=str,
)
def test_into_a_model_that_is_quantized_already(options, tmp_path):
    model = quantized(weights=3, activations=4, symmetric=False)
    other = lq.attach(small(9), **options).eval()
    if options.get("activations"):
        lq.calibrate(other, [images(16, 5)])
    round_trip(model, other, images(), tmp_path)
    assert {str(q.estimator) for q in quantizers(other)} == {"LSQPlus()" if "estimator" in options else "STE()"}


@pytest.mark.parametrize("per_channel", [True, False])
def test_into_a_model_with_steps_of_another_granularity(per_channel, tmp_path):
    model = lq.attach(small(), lq.QuantSpec(3, per_channel=per_channel)).eval()
    other = lq.attach(small(9), lq.QuantSpec(3, per_channel=not per_channel)).eval()
    round_trip(model, other, images(), tmp_path)


def test_into_a_model_in_training_mode_and_of_frozen_weights(tmp_path):
    model = quantized(weights=3, activations=4)
    lq.save(model, tmp_path / "m.safetensors")
    fresh = small(9).train().requires_grad_(False)
    lq.load(tmp_path / "m.safetensors", fresh)
    assert fresh.training and all(part.training for part in fresh.modules())
    assert not float_weight(fresh[2]).requires_grad
    assert torch.equal(fresh.eval()(images()), model(images()))


def test_names_of_files_are_strings_or_paths(tmp_path):
    model = quantized(weights=3)
    for path in (str(tmp_path / "a.safetensors"), tmp_path / "b.c.safetensors"):
        assert lq.save(model, path) > 0
        assert torch.equal(lq.load(path, small(9).eval())(images()), model(images()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.c.safetensors").read_bytes()


def test_models_in_training_mode_are_saved_alike(tmp_path):
    model = quantized(weights=3, activations=4)
    lq.save(model, tmp_path / "eval.safetensors")
    lq.set_estimator(model.train(), "lsq")
    lq.save(model, tmp_path / "train.safetensors")
    assert model.training
    assert (tmp_path / "eval.safetensors").read_bytes() == (tmp_path / "train.safetensors").read_bytes()


def test_another_tool_can_open_a_file(tmp_path):
    from safetensors.torch import load_file

    model = quantized(weights=3, activations=4)
    lq.save(model, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {key: value.dtype for key, value in found.items()} == {"index": torch.uint8, "data": torch.uint8}
    header, index, data = parse((tmp_path / "m.safetensors").read_bytes())
    assert header["__metadata__"] == {"format": "lq packed 1", "lq": lq.__version__}
    assert bytes(found["index"].tolist()) == index and bytes(found["data"].tolist()) == data


# --- Lightning --------------------------------------------------------------------------------------------------------


class Around(Tiny):
    """A module that holds its network and a copy of it, of which one is quantized."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)
        self.register_buffer("seen_samples", torch.tensor(0))


def test_a_lightning_module_around_a_quantized_model(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return Around().eval()

    module, x = build(0), torch.randn(4, 1, 6, 6)
    lq.calibrate(lq.attach(module, 3, 4, include="net"), [x])
    module.seen_samples += 12
    loaded = round_trip(module, build(1), x, tmp_path)
    assert int(loaded.seen_samples) == 12 and not any(q.name.startswith("teacher") for q in quantizers(loaded))
    assert_same(loaded.teacher.state_dict(), module.teacher.state_dict())


@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus"])
def test_training_goes_on_from_a_file(estimator, tmp_path):
    module, x = tiny(), torch.randn(4, 1, 6, 6)
    fit(module, [Quantize(3, 4, fold_bn=False, symmetric=False), FineTune(estimator)], max_steps=2)
    lq.save(module, tmp_path / "first.safetensors")
    loaded = lq.load(tmp_path / "first.safetensors", tiny(5))
    begin, weights = steps(loaded), float_weight(loaded.net[3]).detach().clone()
    fit(loaded, [FineTune(estimator)], max_steps=2, max_epochs=-1)
    assert len(loaded.seen) == 2
    assert all(bool((a != b).any()) for a, b in zip(begin, steps(loaded), strict=True))
    assert not torch.equal(weights, float_weight(loaded.net[3]))
    (second := tmp_path / "second").mkdir()
    round_trip(loaded.eval(), tiny(7).eval(), x, second)
    assert (second / "model.safetensors").read_bytes() != (tmp_path / "first.safetensors").read_bytes()


def test_a_loaded_model_trains_like_the_one_that_was_saved_but_for_the_rounding_of_its_weights(tmp_path):
    """Weights that are on their levels already: the file leaves nothing out."""
    module = tiny()
    fit(module, [Quantize(3, 4, fold_bn=False)], max_steps=1)
    lq.save(module, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", tiny(5))
    twin = lq.load(module.state_dict(), tiny(6))
    with torch.no_grad():
        for mine, theirs in zip(twin.modules(), loaded.modules(), strict=True):
            if weight_quantizer(mine) is not None:
                float_weight(mine).copy_(float_weight(theirs))
    for model in (loaded, twin):
        fit(model, [FineTune("lsq")], max_steps=2, max_epochs=-1)
    assert_same(loaded.state_dict(), twin.state_dict())


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """A network of 11.7 million weights, BatchNorms folded, and the bytes of what is not quantized."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", zero_init_last=False).eval()
    lq.fold_batchnorm(model)
    lq.attach(model, lq.QuantSpec(4, range="minmax"), first_last=None)
    left = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.endswith("bias"))
    return model, left


def least_size(model, left):
    """Bytes of codes, of a step for each channel that is kept, and of the rest."""
    codes = kept = 0
    for part in model.modules():
        if (quantizer := weight_quantizer(part)) is not None:
            weight = float_weight(part)
            codes += int(quantizer.bits.detach().sum()) * (weight.numel() // weight.shape[0])
            kept += int((quantizer.bits > 0).sum())
    return codes / 8 + 4 * kept + left


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_widths_take_their_bits(bits, large, tmp_path):
    model, left = large
    lq.set_bits(model, {"*": bits})
    least = least_size(model, left)
    assert 11e6 * bits / 8 < least
    assert least < lq.save(model, tmp_path / "m.safetensors") <= 1.01 * least


def mix(model, widths):
    """Give each channel one of `widths`, in turn at random."""
    generator = torch.Generator().manual_seed(0)
    for name, part in model.named_modules():
        if weight_quantizer(part) is not None:
            channels = weight_quantizer(part).bits.numel()
            drawn = torch.randint(0, len(widths), (channels,), generator=generator).tolist()
            lq.set_bits(model, {name: [widths[i] for i in drawn]})


def test_a_width_for_each_channel_takes_its_bits(large, tmp_path):
    model, left = large
    mix(model, [2, 3, 4])
    size = lq.save(model, tmp_path / "m.safetensors")
    assert size <= 1.01 * least_size(model, left)
    torch.manual_seed(1)
    loaded = lq.load(tmp_path / "m.safetensors", timm.create_model("resnet18").eval())
    assert_same(integers(loaded), integers(model))
    assert_same(grids(loaded), grids(model))


def test_pruned_channels_take_nothing(large, tmp_path):
    model, left = large
    lq.set_bits(model, {"*": 3})
    whole, least = lq.save(model, tmp_path / "whole.safetensors"), least_size(model, left)
    for name, part in model.named_modules():
        if weight_quantizer(part) is not None:
            lq.set_bits(model, {name: [3, 0] * (weight_quantizer(part).bits.numel() // 2)})
    half, least_half = lq.save(model, tmp_path / "half.safetensors"), least_size(model, left)
    assert least - least_half > 0.49 * 11.6e6 * 3 / 8
    assert abs((whole - half) - (least - least_half)) <= 100


def test_half_of_the_channels_of_a_small_model(tmp_path):
    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)), 3, first_last=None)
    whole = lq.save(model, tmp_path / "whole.safetensors")
    lq.set_bits(model, {"0": [3, 0] * 32})
    assert abs(whole - lq.save(model, tmp_path / "half.safetensors") - 32 * (64 * 3 // 8 + 4)) <= 100


def test_activations_take_a_step_and_a_byte(tmp_path):
    first = lq.save(quantized(activations=None), tmp_path / "a.safetensors")
    second = lq.save(quantized(activations=8), tmp_path / "b.safetensors")
    assert 3 * 4 <= second - first <= 3 * 5 + 60


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
