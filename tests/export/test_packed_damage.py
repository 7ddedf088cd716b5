"""Packed files that are damaged at random are errors, and the model stays as it is."""

import random
import struct

import pytest

import lq
from lq.errors import DataError
from tests.attachment.networks import small
from tests.export.damage import DAMAGE, flip_in_header, outcome


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
