"""Files from outside, read within limits and with errors that name the place.

All that lq reads comes through here: text by `read_text`, JSON by `parse_json`, checkpoints by `read_checkpoint`,
packed bytes by `decompress`. What the content must look like is said by `lq.files.schema`.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lq.errors import DataError, LqError

#: Largest text that is read, in bytes.
TEXT_LIMIT = 1 << 28

# Digits of the longest integer in a JSON file: enough for 64 bits.
_DIGITS = 20


def require_file(path: str | Path, error: type[LqError] = DataError) -> Path:
    """The path, if there is a file that can be opened.

    Raises:
        DataError: (or `error`) if not; the message says why.
    """
    try:
        if Path(path).is_dir():
            raise error(f"{path} is a folder; give the name of a file")
        if Path(path).exists() and not Path(path).is_file():  # a pipe would never end
            raise error(f"{path} is no ordinary file, but a pipe, socket or device; give the name of a file")
        with Path(path).open("rb"):
            return Path(path)
    except FileNotFoundError as cause:
        raise error(f"there is no file {path}") from cause
    except (OSError, ValueError) as cause:  # no permission, a name with a zero byte
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{str(path)!r} cannot be opened: {reason}") from cause


def read_text(path: str | Path, *, limit: int = TEXT_LIMIT, error: type[LqError] = DataError) -> str:
    """The text of a file in UTF-8; a byte order mark is left out.

    Raises:
        DataError: (or `error`) if there is no such file, if it is larger than `limit` bytes, or is no text.
    """
    with require_file(path, error).open("rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as cause:
            raise error(f"{path} cannot be read: {cause.strerror}") from cause
    if len(content) > limit:
        raise error(f"{path} is larger than {limit} bytes, too large for what it should hold")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path}, byte {cause.start}: it is no text in UTF-8; is it another file?") from cause


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Put the path of a file before the message of an error about its content."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        DataError: if it is no JSON, has a key twice in one object, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise DataError(f"line {error.lineno}, column {error.colno}: no JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError("no JSON that lq writes: it is nested too deeply") from error
    except ValueError as error:  # of the two functions below, and of bytes that are no text
        raise DataError(f"no JSON that lq writes: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def decompress(data: bytes, limit: int) -> bytes:
    """The inverse of ``zlib.compress``, if the result has at most `limit` bytes.

    Raises:
        DataError: if it would be larger, or `data` is damaged.
    """
    machine = zlib.decompressobj()
    try:
        found = machine.decompress(data, limit + 1)
    except zlib.error as error:
        raise DataError(f"cannot be decompressed ({error})") from error
    if len(found) > limit:
        raise DataError(f"would take more than {limit} bytes, too large for what it should hold")
    if not machine.eof or machine.unused_data:
        raise DataError("cannot be decompressed (it is cut, or goes on behind its end)")
    return found


def read_checkpoint(path: str | Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        DataError: if there is no such file, it is damaged, or holds other objects.
    """
    file = require_file(path)
    _require_plain_archive(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise DataError(f"{path} is no checkpoint of tensors: it asks for more memory than there is") from error
    except Exception as error:  # a damaged pickle raises anything
        raise DataError(f"{path} is no checkpoint of tensors: {_reason(error)}") from error


def _require_plain_archive(path: Path) -> None:
    """Raise if the archive of ``torch.save`` would be larger unpacked: torch stores tensors as they are."""
    with path.open("rb") as file:
        start = file.read(4)
        size = file.seek(0, os.SEEK_END)
    if not size:
        raise DataError(f"{path} is no checkpoint of tensors: it is empty")
    if start != b"PK\x03\x04":
        if start[:1] != b"\x80":  # the pickles of older files
            raise DataError(f"{path} is no checkpoint of tensors: torch.save writes archives, which begin otherwise")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            small = sum(part.file_size for part in parts) <= size
            wrong = [part.filename for part in parts if small and not _is_sound(archive, part)]
    except Exception as error:  # zipfile raises many kinds of its own
        raise DataError(f"{path} is no checkpoint of tensors: it is cut or damaged ({error})") from error
    if wrong and len(wrong) < len(parts):  # torch can leave out all checksums
        raise DataError(f"{path} is no checkpoint of tensors: it is damaged, the checksum of {wrong[0]!r} does not fit")
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    total = sum(part.file_size for part in parts)
    if packed or total > size:
        reason = f"{packed[0]!r} in it is compressed" if packed else f"its parts have {total} bytes, the file {size}"
        raise DataError(f"{path} is no checkpoint of tensors: {reason}, which torch.save never writes")


def _is_sound(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    """Whether a part of an archive has the checksum that the archive says."""
    try:
        with archive.open(part) as file:
            while file.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _reason(error: Exception) -> str:
    """One line on why torch could not read a file."""
    text = " ".join(str(error).split()) or type(error).__name__
    other = re.search(r"Unsupported (?:global|class|operand|operand type):? (?:GLOBAL )?([\w.]+)", text)
    if other or ("weights_only" in text.lower() and "GLOBAL" in text):
        name = other[1] if other else "something"
        return (
            f"it holds a {name} besides tensors and plain values, and lq unpickles nothing else; save the weights "
            "alone, torch.save(module.state_dict(), path)"
        )
    text = text.split("Please file an issue", 1)[0].split(" (1) ", 1)[0]
    return f"{type(error).__name__}: {text[:300]}"
