"""What else a model has: buffers, extra states, odd names."""

import pytest
import torch
from torch import nn

import lq
from lq.errors import DataError
from tests.export.files import QUIETLY, calibrated, round_trip

pytestmark = QUIETLY


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
