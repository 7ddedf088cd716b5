"""Memory that a process frees stays with it, for as long as a loop needs the same again at every step."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Parameters of mallopt (malloc.h) and what glibc begins with, for blocks as large as it lets its own threshold grow.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10}
_KEEPING = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Have glibc keep freed blocks of up to a gigabyte inside, and give them back to the system afterwards.

    Else it maps and unmaps every block of 32 MB or more: the system then clears each page of each large tensor at every
    step, which takes longer than to compute with it. (EfficientNet-Lite0's first six layers, batches of 32 images of
    224 pixels: 4.4 times the CPU time for the same steps.) Nothing is changed for other devices, elsewhere than on
    Linux with glibc, or where the environment says how to keep memory (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    for parameter, value in _KEEPING.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
