"""Packed files whose index says something else, with a checksum that is right."""

import copy
import json
import zlib

import pytest
import torch
from torch import nn

import lq
from lq.errors import DataError
from tests.attachment.networks import small
from tests.export.damage import QUICK, outcome, saved_model
from tests.export.files import build, parse, signed, state
from tests.helpers import assert_same

# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_of_one_model_with_the_data_of_another(saved, tmp_path):
    path = tmp_path / "m.safetensors"
    lq.save(saved_model(widths=(8, 3, 0, 1)), path)
    other, (_, index, data) = parse(path.read_bytes()), parse(saved[1])
    assert len(other[2]) == len(data) and other[2] != data and other[1] != index
    length = len(other[1])
    header = copy.deepcopy(other[0])
    header["data"]["data_offsets"], header["index"]["data_offsets"] = [length, length + len(data)], [0, length]
    assert not outcome(build(header, other[1], data), saved, path)
    with pytest.raises(DataError, match="its checksum does not fit its content"):
        lq.load(path, small())


def rewritten(content, change, **options):
    """A file of a changed index and, if asked, other data; its checksum is right."""
    header, index, data = parse(content)
    found = json.loads(zlib.decompress(index))
    changed = change(found)
    found = found if changed is None else changed
    return signed(header["__metadata__"], found, options.get("data", data[:-16]))


def column(place, old, new):
    """An index with another text in a column."""

    def change(index):
        assert old in index[place]
        index[place] = index[place].replace(old, new, 1)

    return change


INDICES = {
    "other data": (lambda i: None, {"data": b"1234"}, r"its index lists \d+ bytes, there are 4"),
    "no list": (lambda i: b'{"a": 1}', {}, "its index cannot be read"),
    "an empty list": (lambda i: [], {}, "its index cannot be read"),
    "no JSON": (lambda i: b"nothing", {}, "its index cannot be read"),
    "no text": (lambda i: b"\xff\xfe", {}, "its index cannot be read"),
    "a column of numbers": (lambda i: [*i[:2], 5, *i[3:]], {}, "its index cannot be read"),
    "an unknown letter": (lambda i: [*i[:4], "?" * i[0], *i[5:]], {}, "its index cannot be read"),
    "an unknown type": (column(6, "float32", "execute"), {}, "'execute' is no type of tensors"),
    "what is no type": (column(6, "float32", "load"), {}, "'load' is no type of tensors"),
    "another layer": (column(2, "2:w", "3:w"), {}, "is not of this Sequential"),
    "another shape": (column(8, "4", "5"), {}, "its index lists"),
    "another width": (column(3, "3", "4"), {}, "its index lists"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_indices_that_say_something_else_are_errors(kind, saved, tmp_path):
    change, options, message = INDICES[kind]
    path = tmp_path / "m.safetensors"
    assert not outcome(rewritten(saved[1], change, **options), saved, path)
    with pytest.raises(DataError, match=message):
        lq.load(path, small())


def test_an_index_that_says_the_same_is_the_same(saved, tmp_path):
    assert outcome(rewritten(saved[1], lambda index: None), saved, tmp_path / "m.safetensors")


MADE_UP = {
    "an unknown width": column(3, "3", "{"),
    "a dimension that is not there": column(6, "float32/0/1", "float32/4/1"),
    "no groups": column(6, "float32/0/1", "float32/0/0"),
    "no type": column(6, "/float32/0/1", ""),
    "other groups": column(6, "float32/0/1", "float32/0/7"),
}


@pytest.mark.parametrize("kind", MADE_UP)
def test_indices_that_were_made_up(kind, saved, tmp_path):
    assert not outcome(rewritten(saved[1], MADE_UP[kind]), saved, tmp_path / "m.safetensors")


# --- parts of parameters ----------------------------------------------------------------------------------------------


class ByThreeParts(nn.Module):
    """Attention in which queries, keys and values are parts of one parameter."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, 2 * x, 3 * x)[0]


PARTS = {
    "undamaged": (lambda i: None, None),
    "beyond the end": (column(6, "/32/4,1/12,4/", "/33/4,1/12,4/"), "attention.in_proj_weight has a part that is not"),
    "before the start": (column(6, "/16/4,1/12,4/", "/-1/4,1/12,4/"), "its index cannot be read"),
    "strides": (column(6, "/32/4,1/12,4/", "/32/8,1/12,4/"), "attention.in_proj_weight has a part that is not in it"),
    "negative strides": (column(6, "/32/4,1/12,4/", "/47/-4,1/12,4/"), "its index cannot be read"),
    "a larger parameter": (
        lambda i: _all(i, "/12,4/", "/40,4/"),
        "in_proj_weight is \\(40, 4\\) there",
    ),
    "a huge parameter": (lambda i: _all(i, "/12,4/", "/9999999999,4/"), "in_proj_weight is \\(9999999999, 4\\) there"),
    "another parameter": (lambda i: _all(i, "in_proj_weight", "bias_of_k"), "is not of this ByThreeParts"),
    "no stride": (column(6, "/32/4,1/12,4/", "/32/x/12,4/"), "its index cannot be read"),
}


def _all(index, old, new):
    assert index[6].count(old) == 3
    index[6] = index[6].replace(old, new)


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_parameters_that_are_not_there(kind, tmp_path):
    change, message = PARTS[kind]
    torch.manual_seed(0)
    model, x, path = ByThreeParts().eval(), torch.randn(2, 3, 4), tmp_path / "m.safetensors"
    lq.attach(model, QUICK, structure=lq.inspect(model, x))
    lq.save(model, path)
    path.write_bytes(rewritten(path.read_bytes(), change))
    fresh = ByThreeParts().eval()
    if message is None:
        assert torch.equal(lq.load(path, fresh)(x), model(x))
        return
    before = state(fresh)
    with pytest.raises(DataError, match=message):
        lq.load(path, fresh)
    assert_same(state(fresh), before)
