"""Where captured activations are kept: on the device, in host memory, or in files, by size.

Each tier takes tensors up to a limit that the user sets; what does not fit goes to the next. Tensors in files are
mapped, and given back to the system after each use, so that they do not count as memory of the process.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lq.allocation.budget import parse_budget
from lq.errors import SpecError


def memory_in_bytes(limit: str | float) -> int:
    """Bytes of ``"4GB"``, or of a number of them.

    >>> memory_in_bytes("1.5MB")
    1500000
    """
    if isinstance(limit, str):
        budget = parse_budget(limit)
        size = budget.limit if budget.kind == "bytes" else 0.0
    else:
        size = 0.0 if isinstance(limit, bool) else float(limit)
    if not size > 0:
        raise SpecError(f"memory={limit!r}; give a number of bytes or a size such as '4GB'")
    return int(min(size, 2.0**62))


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of floating-point numbers itself, or the one of that name.

    >>> dtype_of("float16")
    torch.float16
    """
    if dtype is None:
        return None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise SpecError(f"dtype={dtype!r} is unknown; use 'float32', 'bfloat16', 'float16' or None")
    return named


class Storage:
    """Hands out tensors within limits.

    Args:
        device: where the tensors are used.
        limit: bytes on the device, and bytes in host memory besides.
        folder: where files go; by default the system's folder for temporary files.
    """

    def __init__(self, device: torch.device, limit: int, folder: str | Path | None = None) -> None:
        self.device = device
        self.limit = limit
        self.folder = folder
        self._used = {"device": 0, "cpu": 0}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> "Stored":
        """An uninitialized tensor, in the first tier that has room."""
        size = torch.Size(shape).numel() * dtype.itemsize
        tiers = ("cpu",) if self.device.type == "cpu" else ("device", "cpu")
        for tier in tiers:
            if self._used[tier] + size <= self.limit:
                self._used[tier] += size
                data = torch.empty(shape, dtype=dtype, device="cpu" if tier == "cpu" else self.device)
                stored = Stored(data, None)
                weakref.finalize(stored, self._release, tier, size)
                return stored
        file = _File(size, self.folder)
        flat = torch.frombuffer(file.map, dtype=dtype, count=torch.Size(shape).numel()) if size else torch.empty(0)
        return Stored(flat.view(shape), file)

    def keep(self, tensor: Tensor) -> "Stored":
        """A copy of a tensor."""
        stored = self.empty(tensor.shape, tensor.dtype)
        stored.data.copy_(tensor)
        stored.give_back()
        return stored

    def _release(self, tier: str, size: int) -> None:
        self._used[tier] -= size


class Stored:
    """A tensor that `Storage` handed out.

    Args:
        data: the tensor.
        file: the file behind it, if there is one.
    """

    def __init__(self, data: Tensor, file: "_File | None") -> None:
        self.data = data
        self._file = file

    @property
    def on_disk(self) -> bool:
        """Whether it lies in a file."""
        return self._file is not None

    def write(self, start: int, values: Tensor) -> None:
        """Put `values` at rows `start` and on."""
        self.data[start : start + len(values)].copy_(values)
        self.give_back()

    def rows(self, index: Tensor | slice) -> Tensor:
        """Rows, in memory of their own: on the tensor's device or, from a file, on the CPU."""
        if isinstance(index, slice):
            rows = self.data[index].clone()
        else:
            rows = self.data.index_select(0, index.to(self.data.device, non_blocking=True))
        self.give_back()
        return rows

    def whole(self) -> Tensor:
        """All of it, in memory of its own."""
        copy = self.data.clone()
        self.give_back()
        return copy

    def give_back(self) -> None:
        """Let the system take the memory of a file."""
        if self._file is not None:
            self._file.give_back()


class _File:
    """A file without a name, mapped into memory."""

    def __init__(self, size: int, folder: str | Path | None) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a crash later
            else:
                file.truncate(max(size, 1))
            self.map = mmap.mmap(file.fileno(), max(size, 1))

    def give_back(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
