"""Files that are written whole: nobody sees one half-finished, and what a killed writer left is cleaned up."""

import contextlib
import io
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lq.errors import LqError, WriteError

# Seconds after which an unfinished file is a leftover, whoever began it.
_OLD = 7 * 24 * 3600.0

_counter = itertools.count()
_unfinished: set[Path] = set()  # what threads of this process are writing
_lock = threading.Lock()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, in the folder of `path`; it becomes `path` when all is written, and is removed on an error.

    Each writer has a path of its own: of several to one file, in threads or processes, the last that ends wins. A
    process that is killed meanwhile leaves the old file as it is, and the unfinished one beside it: the next writer of
    that file removes it.

    Raises:
        WriteError: if it cannot be written.
    """
    if not path.name or "\0" in path.name or os.path.isdir(path):
        reason = "it is a folder" if path.name and "\0" not in path.name else "it is no name of a file"
        raise WriteError(f"{str(path)!r} cannot be written: {reason}")
    mine = f"{_host()}.{os.getpid()}.{threading.get_ident()}-{next(_counter)}"
    unfinished = path.with_name(f"{path.name}.{mine}.unfinished")
    with _lock:
        _unfinished.add(unfinished.absolute())
    try:
        _remove_leftovers(path)
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # the name must not be there before the content
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a name that no file can have
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, LqError):
            raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
        raise
    finally:
        with _lock:
            _unfinished.discard(unfinished.absolute())


class _Patient(io.FileIO):
    """A file whose first failure is kept; what is written afterwards goes nowhere."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        done = 0
        while self.failure is None and done < len(view):
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.failure = error
        return len(view)


@contextmanager
def file_for_torch(path: Path) -> Iterator[io.FileIO]:
    """A file to write to for ``torch.save`` and ``torch.export.save``, which may end the process if a write fails.

    Raises:
        OSError: at the end, if a write failed.
    """
    with _Patient(path, "wb") as file:
        yield file
        if file.failure is not None:
            raise file.failure


def _remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` left that are no longer there."""
    pattern = re.compile(rf"{re.escape(path.name)}\.(?:(\w+)\.)?(\d+)(?:\.\d+-\d+)?\.unfinished")
    with contextlib.suppress(OSError):
        for other in path.absolute().parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match is None or not other.is_file():
                continue
            here = match[1] in (None, _host())
            with contextlib.suppress(OSError), _lock:
                old = time.time() - other.stat().st_mtime > _OLD
                gone = here and (other not in _unfinished if int(match[2]) == os.getpid() else _is_gone(int(match[2])))
                if other not in _unfinished and (old or gone):
                    other.unlink(missing_ok=True)


def _host() -> str:
    """Name of this machine, in letters that file names may have."""
    return re.sub(r"\W", "_", socket.gethostname())[:40] or "host"


def _is_gone(process: int) -> bool:
    """Whether a process of this machine has ended; False where that cannot be asked."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False
