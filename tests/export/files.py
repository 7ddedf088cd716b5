"""Packed files, taken apart and put together by other code than lq's."""

import hashlib
import json
import struct
import zlib

import pytest
import torch
from torch import Tensor

import lq
from lq.attachment.stored import stored_weights
from lq.export.integers import settled_zero_point
from lq.quantizer.quantizer import Quantizer
from tests.helpers import QUIET, assert_same

DIGEST = 16

#: Some examples have weights that functions compute; one test is about what is said of them.
TOLD = "ignore:.*weights of functions are stored in float"
QUIETLY = [pytest.mark.filterwarnings(text) for text in (*QUIET, TOLD)]


def calibrated(model, x, **options):
    """Attached as it is said, with ranges, in eval mode."""
    return lq.calibrate(lq.attach(model, **options), [x]).eval()


def parse(content):
    """The header, the index and the data (with its checksum) of a file."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    return header, *(body[slice(*header[name]["data_offsets"])] for name in ("index", "data"))


def build(header, *body):
    """A file of a header and bytes that follow it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(body)


def signed(metadata, index, data):
    """A file with a right checksum, whatever is in it; the index is JSON."""
    packed = zlib.compress(json.dumps(index).encode() if isinstance(index, list) else index)
    text = json.dumps(metadata, sort_keys=True).encode()
    end = len(packed) + len(data) + DIGEST
    header = {
        "__metadata__": metadata,
        "index": {"dtype": "U8", "shape": [len(packed)], "data_offsets": [0, len(packed)]},
        "data": {"dtype": "U8", "shape": [end - len(packed)], "data_offsets": [len(packed), end]},
    }
    return build(header, packed, data, hashlib.blake2b(text + packed + data, digest_size=DIGEST).digest())


def quantizers_by_key(model):
    return {key: module for key, module in model.named_modules(remove_duplicate=False) if isinstance(module, Quantizer)}


def grids(model):
    """All that a quantizer rounds with, and how it was made, by its name in the state dict; pruned channels have no
    step.
    """
    found = {}
    for key, quantizer in quantizers_by_key(model).items():
        bits, step = quantizer.bits.detach(), quantizer.step.detach()
        symmetric = quantizer.is_weight if quantizer.spec is None else quantizer.spec.symmetric
        found[key] = (type(quantizer), symmetric, bits, step.where(bits > 0, 0.0), settled_zero_point(quantizer))
    return found


def state(model):
    """A copy of the state dict; what is no tensor as it is."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()}


def others(model):
    """What is in the state dict besides quantizers and quantized weights."""
    keys = quantizers_by_key(model)
    ours = (*(f"{key}." for key in keys), *(f"{key[:-1]}original" for key in keys if key.endswith(".weight.0")))
    of_functions = {call.key for call in stored_weights(model)}
    return {key: value for key, value in state(model).items() if not key.startswith(ours) and key not in of_functions}


def integers(model):
    return {
        name: (w.codes, w.step.where(w.bits > 0, 0.0), w.zero_point, w.bits, w.layout)
        for name, w in lq.integer_weights(model).items()
    }


@torch.no_grad()
def round_trip(model, fresh, x, folder):
    """Save, load into `fresh`, compare all there is, and save again; returns the loaded model."""
    path, again = folder / "model.safetensors", folder / "again.safetensors"
    expected, before = model(x), state(model)
    assert lq.save(model, path) == path.stat().st_size
    assert_same(state(model), before)
    assert lq.load(path, fresh) is fresh
    assert torch.equal(fresh(x), expected) and bool(expected.isfinite().all())
    assert set(fresh.state_dict()) == set(model.state_dict())
    assert_same(grids(fresh), grids(model))
    assert_same(integers(fresh), integers(model))
    assert_same(others(fresh), others(model))
    lq.save(fresh, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["again.safetensors", "model.safetensors"]
    return fresh
