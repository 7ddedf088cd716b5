"""Packed files to damage, how they are damaged, and what loading them may do."""

import copy
import struct

import torch

import lq
from lq.attachment.sites import is_attached
from lq.errors import DataError
from tests.attachment.networks import images, small
from tests.export.files import grids, integers, state
from tests.helpers import assert_same

NO_PACKED_FILE = r"it is no file of lq.save \(a plain safetensors file goes to model.load_state_dict\)"
QUICK = lq.QuantSpec(2, range="minmax")


def saved_model(bits=3, seed=0, widths=(0, 1, 3, 8)):
    """A network with widths of channels, pruned ones and zero points of all kinds."""
    model = lq.attach(small(seed), bits, 4, symmetric=False, first_last=None)
    lq.set_bits(model, {"2": widths})
    return lq.calibrate(model, [images(8, 2)]).eval()


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
