"""What layers share is shared after loading, and stored once."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import float_weight, input_quantizer, quantizers, weight_quantizer
from tests.export.files import QUIETLY, calibrated, quantizers_by_key, round_trip
from tests.models import EXAMPLES, example

pytestmark = QUIETLY


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
