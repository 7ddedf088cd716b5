"""What a run is made of, told in a way that is the same in every process: hashes of tensors, descriptions of objects.

Of a function there are its qualified name, its code, its defaults, what it closes over and what it looks up; of a
partial function, a dataclass or an object that can be called all of their parts, and the code of classes that are not
lq's; of a module its parameters and buffers, its classes and their settings. Other objects are told by how they print,
or by their class.
"""

import dis
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# How deep objects are looked into: what lies further inside is told by its class.
_DEPTH = 8
# Libraries whose code is told by its names: it is the same in every run, or the versions are others.
_LIBRARIES = {"lq", "torch", "torchvision", "timm", "numpy", "scipy", "lightning", "builtins", "typing", "abc"}

# The folders in a dotted name of lq's: of `lq.<folders>.<file>.<name>`.
_FOLDERS = re.compile(r"\blq\.(?:[a-z]\w*\.)+(?=[a-z]\w*\.[A-Za-z_])")

# What files call lq's modules whose own file has been split since version 0.1.0.
_NAMES_IN_FILES = {
    "lq.activation_quantizer.ActivationQuantizer": "lq.quantizer.ActivationQuantizer",
    "lq.shared.SharedQuantizer": "lq.interception.SharedQuantizer",
    "lq.running.CallQuantizers": "lq.interception.CallQuantizers",
}


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
    combined = Digest()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        combined.add(name)
        combined.add(tensor)
    return combined.value


def digest_of_module(module: nn.Module) -> str:
    """A hash of parameters and buffers, of the classes of all modules and of how those that compute are set."""
    combined = Digest()
    combined.add(digest(named_state(module).items()))
    for part in _settings(module):
        combined.add(repr(part))
    return combined.value


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


def describe_parts(kind: str, parts: Mapping[str, object]) -> str:
    """What an object of a kind is, given its parts, as `describe_object` tells a dataclass.

    >>> describe_parts("lq.Rule", {"lr": 0.1, "dtype": torch.float16})
    'lq.Rule(lr=0.1, dtype=torch.float16)'
    """
    description = _Describing()
    return f"{kind}({', '.join(_named(parts, lambda part: description.of(part, 1)))})"


class _Describing:
    """Describes an object and all in it."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # what is being described: it may hold itself
        self._described: set[int] = set()  # functions, which many may look up

    def of(self, thing: object, depth: int) -> str:
        """The description."""
        if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return repr(thing)
        if isinstance(thing, (type, BuiltinFunctionType)) or thing is Ellipsis:
            return _name(thing)
        if isinstance(thing, PurePath):
            return repr(str(thing))
        if id(thing) in self._described:
            return _name(thing)
        if isinstance(thing, FunctionType):
            self._described.add(id(thing))
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
            inside = [digest_of_module(thing)[:16]]
        elif isinstance(thing, partial):
            kind, inside = "partial", [of(thing.func), *map(of, thing.args), *_named(thing.keywords, of)]
        elif is_dataclass(thing):
            inside = [
                *_named({f.name: getattr(thing, f.name, None) for f in fields(thing)}, of),
                *_own_code(type(thing)),
            ]
        elif isinstance(thing, Mapping):
            inside = [f"{of(key)}: {of(value)}" for key, value in thing.items()]
        elif isinstance(thing, (set, frozenset)):
            inside = sorted(map(of, thing))
        elif isinstance(thing, Sequence):
            inside = map(of, thing)
        elif callable(thing):
            inside = [*_named(dict(sorted(getattr(thing, "__dict__", {}).items())), of), *_own_code(type(thing))]
        else:  # what else it holds may differ from run to run: times, handles, addresses
            own: Any = type(thing).__repr__
            return re.sub(" at 0x[0-9a-f]+", "", repr(thing)) if own is not object.__repr__ else f"<{kind}>"
        return f"{kind}({', '.join(inside)})"


def _named(values: Mapping[str, object], of: Callable[[object], str]) -> list[str]:
    return [f"{name}={of(value)}" for name, value in values.items()]


def _function(function: FunctionType, of: Callable[[object], str]) -> str:
    """Name of a function; code, defaults and surroundings of one that is not lq's own."""
    if not _is_foreign(function):
        parts: list[str] = []
    else:
        parts = [_code(function.__code__)]
        parts += [of(part) for part in function.__defaults__ or ()]
        parts += _named(function.__kwdefaults__ or {}, of)
        parts += _named(_looked_up(function), of)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            parts.append(f"{name}={of(cell.cell_contents)}")
        except ValueError:  # nothing in it yet
            parts.append(name)
    return f"{_name(function)}({', '.join(parts)})" if parts else _name(function)


def _is_foreign(function: FunctionType) -> bool:
    return _package(function) != "lq"


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def _looked_up(function: FunctionType) -> dict[str, object]:
    """What a function finds among the globals of its module, and does not set itself: constants, other functions."""
    known = function.__globals__
    if _package(function) in _LIBRARIES:
        return {}
    names = sorted(name for name in _names_in(function.__code__) if name in known)
    return {name: known[name] for name in names if not isinstance(known[name], ModuleType)}


def _code(code: CodeType) -> str:
    """A hash of what code does, not of where it stands."""
    hashed = hashlib.blake2b(digest_size=6)

    def add(one: CodeType) -> None:
        hashed.update(one.co_code + repr((one.co_names, one.co_varnames, one.co_freevars)).encode())
        for constant in one.co_consts:
            if isinstance(constant, CodeType):
                add(constant)
            else:
                text = sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
                hashed.update(str(text).encode())

    add(code)
    return f"code {hashed.hexdigest()}"


def _settings(module: nn.Module) -> list[tuple[str, ...]]:
    """What kinds of modules there are, by name, and what those without others in them are set to: slopes, strides."""
    plain = (bool, int, float, complex, str, tuple, list, type(None))
    settings: list[tuple[str, ...]] = []
    for name, part in module.named_modules():
        settings.append((name, _name(type(part)), *_own_code(type(part))))
        if not part._modules and not type(part).__module__.startswith("lq."):
            own = {k: v for k, v in sorted(vars(part).items()) if not k.startswith("_") and isinstance(v, plain)}
            settings.append(tuple(f"{key}={value!r}" for key, value in own.items() if key != "training"))
    return settings


def _own_code(kind: type) -> list[str]:
    """The code of the methods of a class that somebody else wrote, and what its plain attributes are."""
    parts = []
    for one in kind.__mro__:
        if _package(one) in _LIBRARIES:
            continue
        for name, value in sorted(vars(one).items()):
            if isinstance(value, FunctionType) and value.__module__ == one.__module__:
                parts.append(f"{name}: {_code(value.__code__)}")
            elif not name.startswith("__") and isinstance(value, (bool, int, float, str)):
                parts.append(f"{name}: {value!r}")
    return parts


def _names_in(code: CodeType) -> set[str]:
    """The names of globals that code and the functions in it read, but for those that they set."""
    by_operation = {step.opname: set[str]() for step in dis.get_instructions(code)}
    for step in dis.get_instructions(code):
        by_operation[step.opname].add(str(step.argval))
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return by_operation.get("LOAD_GLOBAL", set()).union(*inner) - by_operation.get("STORE_GLOBAL", set())


def without_folders(text: str) -> str:
    """A description in which lq's own things do not show the folder of their file, which may move.

    >>> without_folders("lq.reconstruction.rounding.adaround.AdaRound(warmup=0.2)")
    'lq.adaround.AdaRound(warmup=0.2)'
    """
    return _FOLDERS.sub("lq.", text)


def _name(thing: Any) -> str:
    name = without_folders(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}")
    return _NAMES_IN_FILES.get(name, name)
