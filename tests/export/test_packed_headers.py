"""Packed files whose header says something else, or that are of a newer lq."""

import json
import zlib

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import is_attached
from lq.errors import DataError
from tests.attachment.networks import images, quantized, small
from tests.export.damage import NO_PACKED_FILE, outcome
from tests.export.files import build, parse, signed

# --- the header -------------------------------------------------------------------------------------------------------


def edited(content, change):
    header, index, data = parse(content)
    return build(change(header) or header, index, data)


def metadata(**values):
    def change(header):
        header["__metadata__"] |= values

    return change


def tensor(name, **values):
    def change(header):
        header[name] |= values

    return change


def swapped(*keys):
    def change(header):
        for key in keys:
            header["index"][key], header["data"][key] = header["data"][key], header["index"][key]

    return change


def moved(by):
    """The border of index and data lies elsewhere."""

    def change(header):
        index, data = header["index"], header["data"]
        index["data_offsets"][1] += by
        data["data_offsets"][0] += by
        index["shape"][0] += by
        data["shape"][0] -= by

    return change


def renamed(old, new):
    def change(header):
        header[new] = header.pop(old)

    return change


HEADERS = {
    "no metadata": (lambda h: h.pop("__metadata__") and None, NO_PACKED_FILE),
    "empty metadata": (lambda h: h.update(__metadata__={}), NO_PACKED_FILE),
    "no format": (lambda h: h["__metadata__"].pop("format") and None, NO_PACKED_FILE),
    "another format": (metadata(format="pt"), NO_PACKED_FILE),
    "a format without number": (metadata(format="lq packed"), NO_PACKED_FILE),
    "a negative format": (metadata(format="lq packed -1"), NO_PACKED_FILE),
    "a format of two numbers": (metadata(format="lq packed 1.5"), NO_PACKED_FILE),
    "an empty format": (metadata(format=""), NO_PACKED_FILE),
    "an older format": (metadata(format="lq packed 0"), "its checksum does not fit its content"),
    "a newer format": (metadata(format="lq packed 3"), r"format 3 \(lq .*reads formats up to 2.*update lq"),
    "a much newer format": (metadata(format=f"lq packed {10**30}"), "reads formats up to 2"),
    "another version": (metadata(lq="9.9"), "its checksum does not fit its content"),
    "more metadata": (metadata(more="x"), "its checksum does not fit its content"),
    "a number as metadata": (metadata(format=1), "cannot be loaded: .*(expected a string|InvalidHeader)"),
    "names swapped": (swapped("dtype", "shape", "data_offsets"), "checksum|index"),
    "offsets swapped": (swapped("data_offsets"), "cannot be loaded"),
    "shapes swapped": (swapped("shape"), "cannot be loaded"),
    "border moved on": (moved(8), "cannot be loaded"),
    "border moved back": (moved(-8), "cannot be loaded"),
    "all is index": (lambda h: moved(h["data"]["shape"][0])(h), "cannot be loaded"),
    "all is data": (lambda h: moved(-h["index"]["shape"][0])(h), "cannot be loaded"),
    "less than a checksum": (lambda h: moved(h["data"]["shape"][0] - 5)(h), "cannot be loaded"),
    "a tensor renamed": (renamed("data", "weight"), r"it holds \['index', 'weight'\], not \['data', 'index'\]"),
    "no tensors": (lambda h: {"__metadata__": h["__metadata__"]}, "cannot be loaded"),
    "a tensor missing": (lambda h: h.pop("index") and None, "cannot be loaded"),
    "a tensor more": (lambda h: h.update(z={**h["index"], "shape": [0], "data_offsets": [0, 0]}), "cannot be loaded"),
    "shape too long": (tensor("data", shape=[10**6]), "cannot be loaded"),
    "shape too short": (tensor("data", shape=[3]), "cannot be loaded"),
    "a negative shape": (tensor("data", shape=[-1]), "cannot be loaded"),
    "a huge shape": (tensor("data", shape=[2**62, 2**62]), "cannot be loaded"),
    "no shape": (tensor("data", shape=[]), "cannot be loaded"),
    "data in rows": (lambda h: tensor("data", shape=[1, *h["data"]["shape"]])(h), "its tensors are not bytes"),
    "offsets beyond the end": (tensor("data", data_offsets=[0, 10**9]), "cannot be loaded"),
    "offsets backwards": (tensor("data", data_offsets=[50, 3]), "cannot be loaded"),
    "signed bytes": (tensor("data", dtype="I8"), "its tensors are not bytes"),
    "booleans": (tensor("index", dtype="BOOL"), "its tensors are not bytes"),
    "an unknown type": (tensor("index", dtype="U7"), "cannot be loaded"),
    "a list": (lambda h: [1, 2], "cannot be loaded"),
    "no JSON": (lambda h: b"{", "cannot be loaded"),
    "no text": (lambda h: b"\xff\xfe\x00\x01", "cannot be loaded"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_edited_headers_are_errors(kind, saved, tmp_path):
    change, message = HEADERS[kind]
    content, path = edited(saved[1], change), tmp_path / "m.safetensors"
    assert not outcome(content, saved, path)
    with pytest.raises(DataError, match=message):
        lq.load(path, small())


UNREADABLE = {
    "F8_E4M3": tensor("data", dtype="F8_E4M3"),
    "F8_E5M2": tensor("index", dtype="F8_E5M2"),
    "BF16": lambda h: tensor("data", dtype="BF16", shape=[h["data"]["shape"][0] // 2])(h),
    "a format of a raised two": metadata(format="lq packed ²"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_headers_that_numpy_or_python_cannot_read(kind, saved, tmp_path):
    content = saved[1]
    if kind == "BF16" and parse(content)[0]["data"]["shape"][0] % 2:
        content = even(tmp_path)
    assert not outcome(edited(content, UNREADABLE[kind]), saved, tmp_path / "m.safetensors")


def even(folder):
    """A file whose data are an even number of bytes."""
    for seed in range(20):
        model = nn.Sequential(nn.Linear(8 + seed, 3))
        lq.save(lq.attach(model, 3), folder / "even.safetensors")
        content = (folder / "even.safetensors").read_bytes()
        if parse(content)[0]["data"]["shape"][0] % 2 == 0:
            return content
    raise AssertionError("all are odd")


def test_a_header_in_another_order_is_the_same_file(saved, tmp_path):
    header, index, data = parse(saved[1])
    content = build(dict(reversed(header.items())), index, data)
    assert content != saved[1] and outcome(content, saved, tmp_path / "m.safetensors")


# --- formats ----------------------------------------------------------------------------------------------------------


def test_a_newer_format_names_itself_and_says_what_to_do(saved, tmp_path):
    path = tmp_path / "m.safetensors"
    _, index, data = parse(saved[1])
    path.write_bytes(signed({"format": "lq packed 3", "lq": "7.5"}, json.loads(zlib.decompress(index)), data[:-16]))
    model = small()
    with pytest.raises(
        DataError,
        match=r"m.safetensors cannot be loaded: it has format 3 \(lq 7.5\), this lq reads formats up to 2; .*update lq",
    ):
        lq.load(path, model)
    assert not is_attached(model)


def test_an_older_format_is_read(tmp_path, monkeypatch):
    path, model = tmp_path / "m.safetensors", quantized()
    lq.save(model, path)
    monkeypatch.setattr("lq.export.packed.FORMAT", 3)
    assert torch.equal(lq.load(path, small().eval())(images()), model(images()))
