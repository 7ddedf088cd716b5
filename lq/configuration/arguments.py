"""Whether a value from a file can be an argument, by the type that the argument is annotated with."""

import collections.abc
import inspect
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Classes of plain values, and of all that a file can hold.
_PLAIN = (bool, int, float, str, type(None))
_VALUES = (*_PLAIN, list, dict)
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def misfit(cls: Any, argument: str, value: Any) -> str | None:
    """What an argument of a class expects, if the value is another; None if it fits, or if that cannot be known.

    >>> def made(samples: int = 3, lr: float | None = None): ...
    >>> misfit(made, "samples", "many"), misfit(made, "lr", 1)
    ('int', None)
    """
    try:
        hint = get_type_hints(cls.__init__ if inspect.isclass(cls) else cls).get(argument)
    except (NameError, TypeError, AttributeError):  # an annotation may be of names that are there for checkers only
        return None
    return None if hint is None or _fits(value, hint) else _said(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type; True where that cannot be known."""
    origin, arguments = get_origin(hint), get_args(hint)
    kind = origin or hint
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if kind in _MAPS or kind in _LISTS:
        return _fits_parts(value, kind, arguments)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    return _is_a(value, kind)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a class; plain ones strictly, others are left to the class that takes them."""
    if kind is collections.abc.Callable:
        return callable(value)
    if not isinstance(value, _VALUES):
        return kind not in _PLAIN
    if kind in (Any, object):
        return True
    accepted = {float: (int, float), Path: (str, Path), None: (type(None),)}.get(kind, (kind,))
    classes = [type(value), object] if isinstance(value, bool) else type(value).__mro__
    return not (inspect.isclass(kind) or kind is None) or not set(accepted).isdisjoint(classes)


def _fits_parts(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a value is a list or a mapping of parts that fit."""
    if kind in _MAPS:
        pairs = value.items() if isinstance(value, dict) else ()
        known = len(arguments) == 2
        return isinstance(value, dict) and all(
            not known or (_fits(key, arguments[0]) and _fits(part, arguments[1])) for key, part in pairs
        )
    if not isinstance(value, (list, tuple)):
        return False
    if kind is tuple and arguments and arguments[-1] is not ...:
        return len(arguments) == len(value) and all(map(_fits, value, arguments))
    return all(_fits(part, one) for one in arguments[:1] for part in value)


def _said(hint: Any) -> str:
    """A type in few words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(one) for one in get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "null"
    origin = get_origin(hint)
    if origin in _LISTS:
        return "a list"
    if origin in _MAPS or hint in _MAPS:
        return "a mapping"
    return getattr(hint, "__name__", None) or str(hint)
