"""What a run is made of, told in a way that is the same in every process: hashes of tensors, descriptions of objects.

Of a function there are its qualified name, its code, its defaults and what it closes over; of a partial function, a
dataclass or an object that can be called all of their parts; of a module its parameters and buffers. Other objects are
told by how they print, or by their class.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# How deep objects are looked into: what lies further inside is told by its class.
_DEPTH = 8


class Digest:
    """A hash that tensors and texts are added to."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, thing: object) -> None:
        """Add a tensor, with its type and shape, or the description of something else."""
        if not isinstance(thing, Tensor):
            self._text(describe_object(thing))
            return
        values = thing.detach()
        values = values.coalesce().to_dense() if values.is_sparse else values
        self._text(f"{values.dtype} {tuple(values.shape)}")
        flat = values.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        self._hash.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def _text(self, text: str) -> None:
        encoded = text.encode()
        self._hash.update(len(encoded).to_bytes(8, "little"))
        self._hash.update(encoded)

    @property
    def value(self) -> str:
        """The hash of all that was added, in hexadecimal digits."""
        return self._hash.hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors: their names, types, shapes and values; the order does not matter.

    >>> one = digest([("a", torch.zeros(2)), ("b", torch.ones(1))])
    >>> one == digest([("b", torch.ones(1)), ("a", torch.zeros(2))])
    True
    >>> one == digest([("a", torch.zeros(1, 2)), ("b", torch.ones(1))])
    False
    """
    found = Digest()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found.add(name)
        found.add(tensor)
    return found.value


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name; those that are shared by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def describe_object(thing: object) -> str:
    """What an object is, in words that are the same in every process.

    >>> describe_object(partial(max, 1, key=None))
    'partial(builtins.max, 1, key=None)'
    """
    return _Describing().of(thing, 0)


class _Describing:
    """Describes an object and all in it."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # what is being described: it may hold itself

    def of(self, thing: object, depth: int) -> str:
        """The description."""
        if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return repr(thing)
        if isinstance(thing, (type, BuiltinFunctionType)) or thing is Ellipsis:
            return _name(thing)
        if isinstance(thing, PurePath):
            return repr(str(thing))
        if id(thing) in self._open or depth > _DEPTH:
            return f"<{_name(type(thing))}>"
        self._open.add(id(thing))
        try:
            return self._inside(thing, lambda part: self.of(part, depth + 1))
        finally:
            self._open.discard(id(thing))

    def _inside(self, thing: Any, of: Callable[[object], str]) -> str:
        kind = _name(type(thing)).removeprefix("builtins.")
        if isinstance(thing, FunctionType):
            return _function(thing, of)
        if isinstance(thing, MethodType):
            return f"{of(thing.__func__)} of {of(thing.__self__)}"
        inside: Iterable[str]
        if isinstance(thing, Tensor):
            inside = [digest([("", thing)])[:16]]
        elif isinstance(thing, np.ndarray):
            inside = [str(thing.dtype), str(thing.shape), hashlib.blake2b(thing.tobytes()).hexdigest()[:16]]
        elif isinstance(thing, nn.Module):
            inside = [digest(named_state(thing).items())[:16]]
        elif isinstance(thing, partial):
            kind, inside = "partial", [of(thing.func), *map(of, thing.args), *_named(thing.keywords, of)]
        elif is_dataclass(thing):
            inside = _named({f.name: getattr(thing, f.name, None) for f in fields(thing)}, of)
        elif isinstance(thing, Mapping):
            inside = [f"{of(key)}: {of(value)}" for key, value in thing.items()]
        elif isinstance(thing, (set, frozenset)):
            inside = sorted(map(of, thing))
        elif isinstance(thing, Sequence):
            inside = map(of, thing)
        elif callable(thing):
            call: Any = vars(type(thing)).get("__call__")
            code = [_code(call.__code__)] if isinstance(call, FunctionType) and _is_foreign(call) else []
            inside = [*_named(dict(sorted(getattr(thing, "__dict__", {}).items())), of), *code]
        else:  # what else it holds may differ from run to run: times, handles, addresses
            own: Any = type(thing).__repr__
            return re.sub(" at 0x[0-9a-f]+", "", repr(thing)) if own is not object.__repr__ else f"<{kind}>"
        return f"{kind}({', '.join(inside)})"


def _named(values: Mapping[str, object], of: Callable[[object], str]) -> list[str]:
    return [f"{name}={of(value)}" for name, value in values.items()]


def _function(function: FunctionType, of: Callable[[object], str]) -> str:
    """Name of a function; code, defaults and surroundings of one that is not lq's own."""
    if not _is_foreign(function):
        given: list[str] = []
    else:
        given = [_code(function.__code__)]
        given += [of(part) for part in function.__defaults__ or ()]
        given += _named(function.__kwdefaults__ or {}, of)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            given.append(f"{name}={of(cell.cell_contents)}")
        except ValueError:  # nothing in it yet
            given.append(name)
    return f"{_name(function)}({', '.join(given)})" if given else _name(function)


def _is_foreign(function: FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] != "lq"


def _code(code: CodeType) -> str:
    """A hash of what code does, not of where it stands."""
    found = hashlib.blake2b(digest_size=6)

    def add(one: CodeType) -> None:
        found.update(one.co_code + repr((one.co_names, one.co_varnames, one.co_freevars)).encode())
        for constant in one.co_consts:
            if isinstance(constant, CodeType):
                add(constant)
            else:
                text = sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
                found.update(str(text).encode())

    add(code)
    return f"code {found.hexdigest()}"


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"
