"""The summary against counts by hand."""

import io
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.summary import FLOAT_BITS


def model(**options):
    """A conv of 8x3x3x3, a norm of 8, a linear of 5x8."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    return lq.attach(net, **{"weights": 4, "activations": None, "first_last": None, **options})


IMAGES = torch.ones(2, 3, 6, 6)
NORM = 4 * 8 * 4 + 8  # four float vectors and an int64 counter
FLOAT = (216 + 8) * 4 + NORM + (40 + 5) * 4


@pytest.mark.parametrize(
    ("options", "conv", "linear"),
    [
        ({}, 216 * 4 // 8 + 8 * 4 + 8 * 4, 40 * 4 // 8 + 5 * 4 + 5 * 4),
        ({"weights": 1}, 216 // 8 + 8 * 4 + 8 * 4, 40 // 8 + 5 * 4 + 5 * 4),
        ({"weights": 0}, 8 * 4 + 8 * 4, 5 * 4 + 5 * 4),
        ({"weights": lq.QuantSpec(4, per_channel=False)}, 108 + 4 + 32, 20 + 4 + 20),
        ({"weights": lq.QuantSpec(4, symmetric=False)}, 108 + 2 * 32 + 32, 20 + 2 * 20 + 20),
        ({"overrides": {"5": {"weights": lq.QuantSpec((0, 1, 2, 3, 8))}}}, 172, (8 * 14 + 5 * 4 + 7) // 8 + 20 + 20),
        ({"overrides": {"5": {"weights": None, "activations": 8}}}, 172, 160 + 20 + 4 + 4),
    ],
)
def test_bytes(options, conv, linear):
    summary = lq.summary(model(**options))
    assert [layer.bytes for layer in summary.layers] == [conv, linear]
    assert summary.bytes == conv + linear + NORM
    assert summary.float_bytes == FLOAT
    assert summary.compression == pytest.approx(FLOAT / (conv + linear + NORM))


@pytest.mark.parametrize("widths", [(2, 3, 2), (1, 1, 1), (1, 0, 0), (8, 1, 2)])
@pytest.mark.parametrize("inputs", [1, 3, 7, 11])
def test_packed_codes_fill_whole_bytes(widths, inputs):
    net = lq.attach(nn.Sequential(nn.Linear(inputs, 3, bias=False)), lq.QuantSpec(widths), first_last=None)
    told = 4 * 3 if len(set(widths)) > 1 else 0  # which width each channel has
    assert lq.summary(net).bytes == (sum(widths) * inputs + told + 7) // 8 + 3 * 4


def test_average_bits_counts_values():
    summary = lq.summary(model(overrides={"5": {"weights": lq.QuantSpec((0, 1, 2, 3, 8))}}))
    assert summary.layers[1].average_bits == pytest.approx(14 / 5)
    assert summary.layers[1].weight_bits == (0, 1, 2, 3, 8)
    assert summary.average_bits == pytest.approx((216 * 4 + 8 * 14) / 256)


@pytest.mark.parametrize(("bits", "expected"), [(None, FLOAT_BITS), (8, 8), (1, 1), (0, 0)])
def test_bit_operations(bits, expected):
    net = model(activations=bits)
    if bits is not None:
        lq.calibrate(net, [IMAGES])
    summary = lq.summary(net, IMAGES)
    conv, linear = summary.layers
    assert (conv.macs, linear.macs) == (16 * 216, 40)
    assert conv.bitops == 16 * 216 * 4 * FLOAT_BITS
    assert linear.bitops == 40 * 4 * expected
    assert summary.bitops == conv.bitops + linear.bitops


def test_operations_noted_by_calibration():
    net = model(activations=8)
    assert lq.summary(net).bitops is None
    lq.calibrate(net, [IMAGES, IMAGES])
    assert lq.summary(net).bitops == lq.summary(net, IMAGES).bitops > 0


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (5, 4, 8), 6 * 6 * 2 * 3),
        (nn.Conv2d(4, 6, 3, stride=2), (5, 4, 9, 9), 16 * 6 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(4, 6), (5, 7, 4), 7 * 24),
        (nn.Embedding(9, 6), None, 0),
    ],
)
def test_operations_of_each_kind(layer, shape, macs):
    net = lq.attach(nn.Sequential(layer), first_last=None)
    x = torch.zeros(5, 7, dtype=torch.int64) if shape is None else torch.ones(shape)
    assert lq.summary(net, x).layers[0].macs == macs


def test_operations_of_a_layer_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3)

        def forward(self, x):
            return self.up(input=x)

    assert lq.summary(lq.attach(Net()), torch.ones(2, 4, 5, 5)).layers[0].macs == 25 * 4 * 6 * 9


def test_to_dict_is_json():
    summary = lq.summary(lq.calibrate(model(activations=8), [IMAGES]))
    loaded = json.loads(json.dumps(summary.to_dict()))
    assert [layer["name"] for layer in loaded["layers"]] == ["0", "5"]
    assert [layer["kind"] for layer in loaded["layers"]] == ["Conv2d", "Linear"]
    assert loaded["layers"][0]["shape"] == [8, 3, 3, 3]
    assert [layer["input_bits"] for layer in loaded["layers"]] == [None, 8]
    assert loaded["bytes"] == summary.bytes
    assert loaded["compression"] == summary.compression


def test_table():
    lines = str(lq.summary(lq.calibrate(model(activations=8), [IMAGES]))).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["layer", "kind", "weight", "bits", "input bits", "size", "bit ops"]
    assert re.split(r"\s{2,}", lines[1]) == ["0", "Conv2d", "8x3x3x3", "4", "float", "172 B", "442.4 k"]
    assert re.split(r"\s{2,}", lines[2])[:5] == ["5", "Linear", "5x8", "4", "8"]
    assert lines[3].startswith("376 B stored, 3.22x smaller than float (1.2 kB), 4.00 bits per quantized weight, ")


def test_rich_table():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(lq.summary(model()))
    text = console.export_text()
    assert "8x3x3x3" in text
    assert "bits per quantized weight" in " ".join(text.split())


def test_the_model_is_left_as_it_was():
    net = model().train()
    mean = net[1].running_mean.clone()
    lq.summary(net, IMAGES)
    assert net.training
    assert torch.equal(net[1].running_mean, mean)
    assert not net[0]._forward_hooks


def test_tied_tensors_count_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.LayerNorm(4))
    net[2].weight = net[1].weight
    lq.attach(net, 4, first_last=None)
    assert lq.summary(net).float_bytes == 64 + 3 * 16


class Functions(nn.Module):
    """Weights that functions use: of an LSTM, one that two calls share, one that is computed first."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.twice = nn.Parameter(torch.randn(5, 5))
        self.scaled = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        x = self.lstm(x)[0]
        return F.linear(x, self.twice) + F.linear(x, self.scaled * 2)


def functions(**options):
    torch.manual_seed(0)
    net, x = Functions().eval(), torch.randn(3, 4, 6)
    options = {"weights": 4, "first_last": None, **options}
    return lq.calibrate(lq.attach(net, structure=lq.inspect(net, x), **options), [x]), x


def test_weights_of_functions_count_as_they_are_stored():
    net, x = functions()
    twice, scaled, lstm = lq.summary(net, x).layers
    assert (lstm.name, lstm.shape, lstm.weight_bits, lstm.average_bits) == ("lstm.rnn_0", (20, 11), (4,), 4)
    assert lstm.bytes == 20 * 11 // 2 + 2 * 20 * 4  # a step for each row of both matrices
    assert (twice.shape, twice.bytes) == ((5, 5), 13 + 5 * 4)
    assert (scaled.shape, scaled.bytes) == ((), 5 * 4)  # stored in float: with the rest
    summary = lq.summary(net)
    assert summary.bytes == lstm.bytes + twice.bytes + scaled.bytes + (25 + 40) * 4
    assert summary.float_bytes == (20 * 11 + 40 + 50) * 4
    assert summary.average_bits == 4
    assert len(summary.notes) == 1 and "linear_1_weight (no parameter as it is" in summary.notes[0]
    assert str(summary).endswith(summary.notes[0])


def test_widths_of_several_weights_count_by_their_values():
    net, x = functions()
    lq.set_bits(net, {"lstm.rnn_0_weight_1": [0, 2, 3, 8] * 5})
    lstm = lq.summary(net, x).layers[-1]
    assert lstm.weight_bits == (0, 2, 3, 4, 8)
    assert lstm.average_bits == pytest.approx((4 * 120 + 13 / 4 * 100) / 220)
    codes = 120 * 4 // 8 + (5 * 13 * 5 + 4 * 20 + 7) // 8
    assert lstm.bytes == codes + 2 * 20 * 4
    assert lstm.bitops == lstm.macs * lstm.average_bits * FLOAT_BITS
