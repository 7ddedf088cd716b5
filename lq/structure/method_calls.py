"""Which children the methods of a module call, read from their source: nothing is run.

Methods that `forward` does not use (``features``, ``training_step``) are ways through a network that neither tracing
nor an example shows.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning")


class _Calls(NamedTuple):
    """What a method does with the parts of its module.

    Args:
        children: paths of the modules that it calls ("net.0"; "net.:1" is a slice).
        methods: names of what it reads of the module itself, methods among them.
        parameters: paths of parameters that it reads ("net.0.weight").
        functional: whether it calls modules with other parameters than their own.
    """

    children: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    functional: bool = False


_NOTHING = _Calls()
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
#: What was read of classes.
_KNOWN: WeakKeyDictionary[type, dict[str, _Calls]] = WeakKeyDictionary()


def outside_calls(module: nn.Module, first: str, second: str, *, forward: bool) -> str:
    """Name of a method that calls one of two children and not the other; empty if there is none.

    Args:
        module: the module whose methods are read; those of torch's and Lightning's own classes are not.
        first: name of a child, or of a module further inside.
        second: another, which is called right after it.
        forward: also read `forward` and the methods that it uses.
    """
    methods = _methods(type(module))
    used = _used(methods)
    for name, calls in methods.items():
        if (name not in used or (forward and name == "forward")) and _divides(module, calls, first, second):
            return name
        for path in calls.children:  # another module's method that is not its forward, as in self.net.features(x)
            owner, _, method = path.rpartition(".")
            inner = _submodule(module, owner) if owner else None
            inside = [child[len(owner) + 1 :] for child in (first, second) if child.startswith(f"{owner}.")]
            if inner is not None and len(inside) == 2 and method != "forward":
                called = _methods(type(inner)).get(method)
                if called is not None and _divides(inner, called, *inside):
                    return f"{name} by {method}"
    return ""


def _divides(module: nn.Module, calls: _Calls, first: str, second: str) -> bool:
    """Whether a method calls one of two children by itself, and not the other."""
    covered = [[_is_called(module, path, child) for child in (first, second)] for path in calls.children]
    return ([True, False] in covered) != ([False, True] in covered)


def replaces_parameters(module: nn.Module) -> str:
    """Name of a method that calls modules with other parameters than their own; empty if there is none."""
    return next((name for name, calls in _methods(type(module)).items() if calls.functional), "")


def read_by_forward(module: nn.Module, name: str) -> bool:
    """Whether `forward`, or a method that it uses, reads a parameter of the module `name` inside, by its source."""
    methods = _methods(type(module))
    used = _used(methods)
    return any(path.rpartition(".")[0] == name for key in used & methods.keys() for path in methods[key].parameters)


def switches(module: nn.Module) -> list[str]:
    """Names of the attributes that are True or False and that `forward`, or a method that it uses, reads."""
    used = _used(_methods(type(module)))
    return [name for name, value in vars(module).items() if isinstance(value, bool) and name in used - {"training"}]


def _used(methods: Mapping[str, _Calls]) -> set[str]:
    """Names of `forward` and of what it uses, directly or not."""
    used, new = set[str](), {"forward"}
    while new:
        used |= new
        new = {name for known in new if known in methods for name in methods[known].methods} - used
    return used


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _is_called(module: nn.Module, path: str, child: str) -> bool:
    """Whether a call of `path` runs `child`: it is that child, or a module or a slice around it."""
    owner, _, part = path.rpartition(".")
    if ":" not in part:
        return path == child or (bool(path) and child.startswith(f"{path}."))
    if not child.startswith(f"{owner}."):
        return False
    index = child[len(owner) + 1 :].partition(".")[0]
    held = _submodule(module, owner)
    start, stop = (int(text) if text else None for text in part.split(":"))
    return held is not None and index in list(held._modules)[start:stop]


def _methods(kind: type) -> dict[str, _Calls]:
    """What the methods of a class call, by name; of inherited ones too."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    found: dict[str, _Calls] = {}
    for cls in reversed(kind.__mro__):
        if cls.__module__.partition(".")[0] in _FRAMEWORKS:
            continue
        for name, function in vars(cls).items():
            if isinstance(function, FunctionType) and name != "__init__":
                found[name] = _calls_of(function)
    _KNOWN[kind] = found
    return found


def _calls_of(method: FunctionType) -> _Calls:
    """What a method calls on its first argument; nothing if there is no source to read."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        return _NOTHING
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return _NOTHING
    me = function.args.args[0].arg
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    read = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr in _PARAMETERS]
    children, parameters = (
        frozenset(path for node in nodes if (path := ".".join(_path(node, me)))) for nodes in (called, read)
    )
    functional = "functional_call" in {getattr(func, "attr", getattr(func, "id", "")) for func in called}
    return _Calls(children, frozenset(_own_methods(function, me)), parameters, functional)


def _own_methods(function: ast.FunctionDef, me: str) -> Iterator[str]:
    """Names of what is read of the module itself, or of its bases by ``super()``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(owner, ast.Name) and owner.id in (me, "super"):
                yield node.attr


def _path(node: ast.expr, me: str) -> Iterator[str]:
    """The names from a module to what an expression such as ``self.net[0].conv`` means; none if it is another."""
    parts: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript) and (part := _index(node.slice)):
            parts.append(part)
            node = node.value
        else:
            return
    if node.id == me:
        yield from reversed(parts)


def _index(node: ast.expr) -> str:
    """A constant index, a constant name, or a slice with constant ends."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, str)) and not isinstance(node.value, bool):
        return str(node.value)
    if isinstance(node, ast.Slice) and node.step is None:
        try:
            ends = [None if end is None else ast.literal_eval(end) for end in (node.lower, node.upper)]
        except ValueError:
            return ""
        if all(end is None or isinstance(end, int) for end in ends):
            return ":".join("" if end is None else str(end) for end in ends)
    return ""
