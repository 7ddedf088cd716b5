"""Codes of 1 to 16 bits as bytes: their bits one after the other, so that any width takes just its bits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8] | NDArray[np.uint16]


def packed_size(parts: Sequence[tuple[int, int]]) -> int:
    """Bytes of parts, given the number of codes and the width of each.

    >>> packed_size([(100, 3), (10, 2)])
    40
    """
    return -(-sum(count * bits for count, bits in parts) // 8)


def pack(parts: Sequence[tuple[Codes, int]]) -> bytes:
    """Bytes of parts: codes in ``0 .. 2**bits - 1``, (N,), and their width. A part is stored as planes of bits.

    >>> len(pack([(np.arange(8, dtype=np.uint8), 3), (np.zeros(9, np.uint8), 1)]))
    5
    """
    planes = [codes >> codes.dtype.type(bit) & 1 for codes, bits in parts for bit in range(bits)]
    return np.packbits(np.concatenate(planes).astype(np.uint8, copy=False)).tobytes() if planes else b""


def unpack(data: NDArray[np.uint8], parts: Sequence[tuple[int, int]]) -> list[Codes]:
    """The inverse of `pack`, given the number of codes and the width of each part; uint8 up to 8 bits, uint16 above.

    >>> unpack(np.frombuffer(pack([(np.array([5, 0, 7], np.uint8), 3)]), np.uint8), [(3, 3)])[0].tolist()
    [5, 0, 7]
    """
    stream = np.unpackbits(data)
    found: list[Codes] = []
    start = 0
    for count, bits in parts:
        wide = np.uint8 if bits <= 8 else np.uint16
        codes = np.zeros(count, wide)
        for bit in range(bits):
            codes |= stream[start : start + count].astype(wide) << wide(bit)
            start += count
        found.append(codes)
    return found
