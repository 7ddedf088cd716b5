"""Codes as planes of bits: nothing lost, nothing wasted, and the very bytes that the format says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.export.packing import pack, packed_size, unpack


def codes_of(width):
    """Parts of that width; narrow codes come as uint16 too, beside wide ones."""
    return st.tuples(
        st.lists(st.integers(0, 2**width - 1), max_size=40),
        st.sampled_from([np.uint8, np.uint16] if width <= 8 else [np.uint16]),
        st.just(width),
    )


stored_widths = st.sampled_from([*range(9), 16])
any_parts = st.lists(stored_widths.flatmap(codes_of), max_size=8)


def arrays(parts):
    return [(np.array(codes, wide), width) for codes, wide, width in parts]


def sizes(parts):
    return [(len(codes), width) for codes, _, width in parts]


def packed_by_hand(parts):
    """Planes from the lowest bit on, a byte filled from its highest bit on."""
    stream = [code >> bit & 1 for codes, _, width in parts for bit in range(width) for code in codes]
    stream += [0] * (-len(stream) % 8)
    return bytes(int("".join(map(str, stream[i : i + 8])), 2) for i in range(0, len(stream), 8))


@given(any_parts)
@settings(max_examples=200, deadline=None)
def test_what_is_packed_comes_back(parts):
    data = pack(arrays(parts))
    found = unpack(np.frombuffer(data, np.uint8), sizes(parts))
    assert [codes.tolist() for codes in found] == [codes for codes, _, _ in parts]
    assert [codes.dtype for codes in found] == [np.uint8 if width <= 8 else np.uint16 for _, _, width in parts]


@given(any_parts)
@settings(max_examples=200, deadline=None)
def test_the_bytes_are_those_of_a_loop_over_bits(parts):
    data = pack(arrays(parts))
    assert data == packed_by_hand(parts)
    assert packed_size(sizes(parts)) == len(data)


@given(st.lists(st.integers(9, 16).flatmap(codes_of), max_size=4))
@settings(max_examples=50, deadline=None)
def test_widths_between_8_and_16(parts):
    data = pack(arrays(parts))
    assert data == packed_by_hand(parts)
    assert [c.tolist() for c in unpack(np.frombuffer(data, np.uint8), sizes(parts))] == [c for c, _, _ in parts]


@given(st.lists(st.tuples(st.integers(0, 10**9), stored_widths), max_size=8))
def test_sizes_are_whole_bytes_of_all_parts_together(parts):
    bits = sum(count * width for count, width in parts)
    assert 8 * packed_size(parts) - 7 <= bits <= 8 * packed_size(parts)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], b""),
        ([([], np.uint8, 3)], b""),
        ([([0, 0, 0], np.uint8, 0)], b""),
        ([([1], np.uint8, 1)], b"\x80"),
        ([([5, 0, 7], np.uint8, 3)], b"\xa6\x80"),  # planes 101 001 101
        ([([1, 0], np.uint8, 1), ([3], np.uint8, 2)], b"\xb0"),  # 10, then 1 and 1
        ([([0x1234], np.uint16, 16)], b"\x2c\x48"),  # its bits from the lowest on
        ([([255] * 3, np.uint8, 8)], b"\xff\xff\xff"),
    ],
)
def test_bytes_written_out(parts, expected):
    assert pack(arrays(parts)) == packed_by_hand(parts) == expected
    found = unpack(np.frombuffer(expected, np.uint8), sizes(parts))
    assert [codes.tolist() for codes in found] == [codes for codes, _, _ in parts]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_every_code_of_a_width(width):
    codes = np.arange(2**width, dtype=np.uint8 if width <= 8 else np.uint16)
    data = pack([(codes, width)])
    assert len(data) == -(-(2**width) * width // 8)
    assert np.array_equal(unpack(np.frombuffer(data, np.uint8), [(2**width, width)])[0], codes)


def test_parts_are_packed_as_they_are_strided():
    table = np.arange(32, dtype=np.uint8).reshape(4, 8)
    column = table[:, 3]
    assert pack([(column, 5)]) == pack([(column.copy(), 5)])
    assert table.tolist() == np.arange(32).reshape(4, 8).tolist()
