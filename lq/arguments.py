"""Whether a value from a file can be an argument, by the type that the argument is annotated with."""

import collections.abc
import inspect
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = (bool, int, float, str, type(None))
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
    except Exception:  # an annotation may be anything
        return None
    return None if hint is None or _fits(value, hint) else _said(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type; True where that cannot be known."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    kind = origin or hint
    if kind in _PLAIN:
        wanted = (int, float) if kind is float else kind if isinstance(kind, type) else type(None)
        return isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
    if kind is Path:
        return isinstance(value, (str, Path))
    if kind in _MAPS:
        if not isinstance(value, dict):
            return False
        return len(arguments) != 2 or all(
            _fits(key, arguments[0]) and _fits(part, arguments[1]) for key, part in value.items()
        )
    if kind in _LISTS:
        if kind is not tuple or arguments[-1:] == (...,):
            return isinstance(value, (list, tuple)) and all(_fits(part, arguments[0]) for part in value if arguments)
        return isinstance(value, (list, tuple)) and (
            not arguments or (len(arguments) == len(value) and all(map(_fits, value, arguments)))
        )
    if kind is collections.abc.Callable:
        return callable(value)
    if inspect.isclass(kind) and isinstance(value, (*_PLAIN, list, dict)):
        return issubclass(type(value), kind) if not getattr(kind, "_is_protocol", False) else False
    return True


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
