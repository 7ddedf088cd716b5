"""Weights of functions in packed files: attention, recurrent layers, parts of parameters."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lq
from tests.export.files import QUIETLY, calibrated, quantizers_by_key, round_trip
from tests.models import EXAMPLES, example

pytestmark = QUIETLY


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
