"""Files that are damaged, of a newer lq, of another model, or no packed ones; and saving that ends half-way."""

import copy
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lq
from lq.attachment.sites import is_attached
from lq.errors import DataError
from tests.attachment.test_attach import images, quantized, small
from tests.export.files import build, grids, integers, parse, signed, state
from tests.helpers import assert_same
from tests.models import example

SCRIPT = """
import os, signal, sys

sys.path.insert(0, sys.argv[2])
import torch

torch.set_num_threads(1)
import lq
from lq.export import packed
from tests.export.test_packed_damage import saved_model

original, packs = packed.pack, []


def pack(parts):
    packs.append(parts)
    if len(packs) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(parts)


packed.pack = pack
lq.save(saved_model(2), sys.argv[1])
"""


QUICK = lq.QuantSpec(2, range="minmax")


def saved_model(bits=3, seed=0, widths=(0, 1, 3, 8)):
    """A network with widths of channels, pruned ones and zero points of all kinds."""
    model = lq.attach(small(seed), bits, 4, symmetric=False, first_last=None)
    lq.set_bits(model, {"2": widths})
    return lq.calibrate(model, [images(8, 2)]).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its file's content."""
    model = saved_model()
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    lq.save(model, path)
    return model, path.read_bytes()


def outcome(content, saved, path):
    """Load it into a float and into a quantized model: True if both are those that were saved, False if it is an error
    and both are as they were; anything else fails.
    """
    path.write_bytes(content)
    found = []
    for model in (small(9).eval(), lq.attach(small(9), QUICK).eval()):
        before, attached, kept = state(model), is_attached(model), copy.deepcopy(model)
        try:
            lq.load(path, model)
        except DataError as error:
            found.append(str(error))
            assert is_attached(model) is attached
            assert list(model.state_dict()) == list(before)
            assert_same(state(model), before)
            assert torch.equal(model(images()), kept(images()))
        else:
            found.append("")
            assert torch.equal(model(images()), saved[0](images()))
            assert_same((grids(model), integers(model)), (grids(saved[0]), integers(saved[0])))
    assert found[0] == found[1] or (found[0] and found[1])
    assert not found[0] or str(path) in found[0]
    return not found[0]


# --- damage at random -------------------------------------------------------------------------------------------------


def flip(content, rng):
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_header(content, rng):
    changed = bytearray(content)
    changed[rng.randrange(8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zero(content, rng):
    start, length = rng.randrange(len(content)), rng.choice([1, 2, 8, 40, 200])
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def overwrite(content, rng):
    start = rng.randrange(len(content))
    return (content[:start] + rng.randbytes(rng.choice([1, 4, 16])) + content[start + 16 :])[: len(content)]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def append(content, rng):
    return content + rng.randbytes(rng.choice([1, 7, 8, 16, 1000]))


def insert(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(rng.choice([1, 8])) + content[start:]


def remove(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice([1, 2, 8, 64]) :]


def move(content, rng):
    """Two blocks of the body change places."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    a, b, c = sorted(rng.sample(range(start, len(content)), 3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def repeat(content, rng):
    start = rng.randrange(len(content))
    return content[:start] + content[start : start + 8] * 2 + content[start + 16 :]


DAMAGE = [flip, flip_in_header, zero, overwrite, cut, append, insert, remove, move, repeat]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_files_are_errors(damage, saved, tmp_path):
    rng, errors = random.Random(damage.__name__), 0
    for _ in range(20):
        content = damage(saved[1], rng)
        whole = outcome(content, saved, tmp_path / "m.safetensors")
        errors += not whole
        assert not whole or content == saved[1] or damage is flip_in_header
    assert errors >= 18


def test_an_undamaged_file_is_none(saved, tmp_path):
    assert outcome(saved[1], saved, tmp_path / "m.safetensors")


def test_every_byte_of_the_body_counts(saved, tmp_path):
    """All that follows the header is under the checksum."""
    path, start = tmp_path / "m.safetensors", 8 + struct.unpack("<Q", saved[1][:8])[0]
    for place in range(start, len(saved[1]), 7):
        changed = bytearray(saved[1])
        changed[place] ^= 0x10
        path.write_bytes(bytes(changed))
        with pytest.raises(DataError, match="its checksum does not fit its content|its index cannot be read"):
            lq.load(path, small(9))


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


NO_PACKED_FILE = r"it is no file of lq.save \(a plain safetensors file goes to model.load_state_dict\)"
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


# --- other files ------------------------------------------------------------------------------------------------------


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


def plain(path):
    save_file(small().state_dict(), path)


def plain_with_metadata(path):
    save_file(small().state_dict(), path, metadata={"format": "pt"})


class Evil:
    """What a pickle can do."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(path):
    path.write_bytes(pickle.dumps({"state_dict": Evil(path.parent / "executed")}))


def torch_pickled(path):
    torch.save({"state_dict": Evil(path.parent / "executed")}, path)


FILES = {
    "plain safetensors": (plain, NO_PACKED_FILE),
    "safetensors of transformers": (plain_with_metadata, NO_PACKED_FILE),
    "text": (lambda path: path.write_text("nothing of the kind\n" * 20), "cannot be loaded: .*save the model again"),
    "short text": (lambda path: path.write_text("no"), "cannot be loaded: .*save the model again"),
    "empty": (lambda path: path.touch(), "cannot be loaded: .*save the model again"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "cannot be loaded: .*save the model again"),
    "missing": (lambda path: None, r"there is no file .*m.safetensors"),
    "a folder": (lambda path: path.mkdir(), r"m.safetensors is a folder; give the name of a file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), r"there is no file .*m.safetensors"),
    "a pickle": (pickled, "cannot be loaded: .*save the model again"),
    "a checkpoint": (torch_pickled, "cannot be loaded: .*save the model again"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("as_text", [True, False])
def test_files_of_something_else(kind, as_text, tmp_path):
    make, message = FILES[kind]
    path = tmp_path / "m.safetensors"
    make(path)
    for model in (small(), lq.attach(small(), QUICK)):
        before, attached = state(model), is_attached(model)
        with pytest.raises(DataError, match=message):
            lq.load(str(path) if as_text else path, model)
        assert is_attached(model) is attached
        assert_same(state(model), before)
    assert not (tmp_path / "executed").exists()


def test_the_pickle_above_would_be_executed(tmp_path):
    pickled(tmp_path / "m.pickle")
    pickle.loads((tmp_path / "m.pickle").read_bytes())
    assert (tmp_path / "executed").is_dir()


# --- other models -----------------------------------------------------------------------------------------------------


def classes(count):
    model = small()
    model[6] = nn.Linear(8, count)
    return model


def without_bias():
    model = small()
    model[2] = nn.Conv2d(4, 4, 3, bias=False)
    return model


OTHERS = {
    "another architecture": (
        lambda: example("block")[0],
        "is not of this Block: it has no attn.k.bias, attn.k.weight, attn.proj.bias; "
        "the model has no 0.bias, 0.weight, 2.bias; build the model that was saved, before quantization",
    ),
    "more classes": (
        lambda: classes(5),
        r"6\.(bias|weight) is \(3,?.*\) there and \(5,?.*\) here(; 6\.(bias|weight) is \(3,?.*\) there and .*)?",
    ),
    "a layer missing": (lambda: small()[:6], "the model has no 6.bias, 6.weight;"),
    "a layer more": (
        lambda: nn.Sequential(*small(), nn.Linear(3, 3)),
        "it has no 7.bias, 7.weight;",
    ),
    "a bias missing": (without_bias, "the model has no 2.bias;"),
    "a norm more": (
        lambda: nn.Sequential(*small(), nn.BatchNorm1d(3)),
        "it has no 7.bias, 7.num_batches_tracked, 7.running_mean;",
    ),
    "a wrapped one": (lambda: nn.ModuleDict({"net": small()}), "it has no net.0.bias, .*the model has no 0.bias"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), "the model has no 0.bias, 0.weight, 2.bias;"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("attached", [False, True])
def test_files_of_another_model(kind, attached, saved, tmp_path):
    make, message = OTHERS[kind]
    model = make()
    if attached:
        if kind == "no parameters":
            return
        lq.attach(model, QUICK)
    before, found = state(model), [(name, type(part)) for name, part in model.named_modules()]
    (tmp_path / "m.safetensors").write_bytes(saved[1])
    with pytest.raises(DataError, match=message):
        lq.load(tmp_path / "m.safetensors", model)
    assert [(name, type(part)) for name, part in model.named_modules()] == found
    assert_same(state(model), before)
    assert is_attached(model) is attached


def test_a_layer_of_another_kind_whose_weight_has_the_same_shape(tmp_path):
    model = lq.attach(nn.Sequential(nn.Conv2d(4, 4, 3)), 3, first_last=None)
    lq.save(model, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="0.weight"):
        lq.load(tmp_path / "m.safetensors", nn.Sequential(nn.ConvTranspose2d(4, 4, 3)))


def test_batchnorms_of_another_model_are_not_folded(saved, tmp_path):
    """Those that the file lacks are folded only if all else fits."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *list(small())[2:-1], nn.Linear(8, 5))
    before = state(model)
    (tmp_path / "m.safetensors").write_bytes(saved[1])
    with pytest.raises(DataError, match="6.weight is"):
        lq.load(tmp_path / "m.safetensors", model)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert_same(state(model), before)


# --- saving that ends half-way ----------------------------------------------------------------------------------------


def test_a_process_that_is_killed_leaves_the_old_file(saved, tmp_path):
    path, script = tmp_path / "m.safetensors", tmp_path / "script.py"
    path.write_bytes(saved[1])
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(Path(__file__).parents[2])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".unfinished")]  # it was at it
    assert path.read_bytes() == saved[1]
    assert torch.equal(lq.load(path, small(9).eval())(images()), saved[0](images()))
    again = saved_model(2)
    lq.save(again, path)
    assert torch.equal(lq.load(path, small(9).eval())(images()), again(images()))


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_an_error_half_way_leaves_the_old_file(error, old, saved, tmp_path, monkeypatch):
    path, packs = tmp_path / "m.safetensors", []
    if old:
        path.write_bytes(saved[1])

    def failing(parts):
        packs.append([p.stat().st_size for p in tmp_path.iterdir() if "unfinished" in p.name])
        if len(packs) == 3:
            raise error
        return b"something"

    monkeypatch.setattr("lq.export.packed.pack", failing)
    model = saved_model(2)
    before = state(model)
    with pytest.raises(type(error)):
        lq.save(model, path)
    assert len(packs) == 3 and all(len(sizes) == 1 for sizes in packs)  # an unfinished file beside it
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"] * old
    assert not old or path.read_bytes() == saved[1]
    assert_same(state(model), before)


def test_a_file_is_replaced_by_a_whole_one(saved, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(saved[1])
    model = saved_model(2, seed=1)
    assert lq.save(model, path) == path.stat().st_size < len(saved[1])
    assert torch.equal(lq.load(path, small(9).eval())(images()), model(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_folder_in_its_place_stays(tmp_path):
    (tmp_path / "m.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="m.safetensors"):
        lq.save(quantized(), tmp_path / "m.safetensors")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "m.safetensors",
        "m.safetensors/inside",
    ]
