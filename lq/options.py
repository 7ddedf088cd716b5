"""Options that are written once: a frozen dataclass has their names, types, defaults, texts and checks.

A function or a constructor that takes them has one parameter for all of them, the last one; `takes` shows callers a
keyword argument for each. Type checkers, ``help``, ``inspect.signature`` and LightningCLI's ``--help`` see them all,
with the text that the dataclass has for each under ``Args``; the function hands the dataclass on as a whole.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class GridOptions:
...     '''How a tensor is rounded.
...
...     Args:
...         bits: width of the grid.
...     '''
...
...     bits: int = 8
>>> @takes(GridOptions)
... def levels(scale: float, options: GridOptions) -> float:
...     '''The number of levels, scaled.'''
...     return scale * 2**options.bits
>>> levels(0.5, bits=3)
4.0
>>> inspect.signature(levels)
<Signature (scale: float, bits: int = 8) -> float>
>>> print(levels.__doc__)
The number of levels, scaled.
<BLANKLINE>
Args:
    bits: width of the grid.
<BLANKLINE>
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from torch import nn

P = ParamSpec("P")
O_co = TypeVar("O_co", covariant=True)
O_contra = TypeVar("O_contra", contravariant=True)
O = TypeVar("O")  # noqa: E741
A = TypeVar("A")
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_SECTION = re.compile(r"\w+:{1,2}|>>> .*")
_ENTRY = re.compile(r"    (\w+): ")


# Types of what users call, before and after. Parameters of `Concatenate` have no names, those of these have.


class _Changes(Protocol[O_contra]):
    """A function that changes a model in place."""

    def __call__(self, model: M, options: O_contra) -> M: ...


class _ChangesBy(Protocol[P]):
    def __call__(self, model: M, *args: P.args, **kwargs: P.kwargs) -> M: ...


class _Runs(Protocol[O_contra, R_co]):
    """A function that runs a model on batches."""

    def __call__(self, model: nn.Module, batches: Iterable[Any], options: O_contra) -> R_co: ...


class _RunsBy(Protocol[P, R_co]):
    def __call__(self, model: nn.Module, batches: Iterable[Any], *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Taking(Protocol[P, O_co]):
    """Makes a function that is called with options one by one out of one that is called with all of them."""

    @overload
    def __call__(self, function: _Changes[O_co], /) -> _ChangesBy[P]: ...

    @overload
    def __call__(self, function: _Runs[O_co, R], /) -> _RunsBy[P, R]: ...

    @overload
    def __call__(self, function: Callable[[A, O_co], R], /) -> Callable[Concatenate[A, P], R]: ...


def after(name: str) -> Mapping[str, str]:
    """Metadata of a dataclass field that is shown behind the field `name`; others are in the order of the class."""
    return {"after": name}


def takes(options: Callable[P, O], *, keyword_only: bool = False) -> Taking[P, O]:
    """Show the fields of a dataclass as the last parameters of a function, which gets them as one object.

    On an ``__init__`` it does the same for the class: its docstring gets their texts, and each option is an attribute.
    One that is set makes ``self.options`` anew, so that it is checked like one that was given.

    Args:
        options: a frozen dataclass whose docstring, or that of a base, has a text for each field under ``Args``.
        keyword_only: show all of them as keyword-only parameters.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        own = list(inspect.signature(function).parameters.values())[:-1]
        shown = parameters_of(options, keyword_only=keyword_only)  # type: ignore[arg-type]
        returned = inspect.signature(function).return_annotation
        signature = inspect.Signature([*own, *shown], return_annotation=returned)

        @functools.wraps(function)
        def taking(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{function.__qualname__}() {error}") from None
            before = [bound.pop(parameter.name) for parameter in own]
            return function(*before, options(**bound))  # type: ignore[call-arg]

        taking.__signature__ = signature  # type: ignore[attr-defined]
        taking.__annotations__ = {p.name: p.annotation for p in [*own, *shown] if p.annotation is not p.empty}
        taking.__annotations__["return"] = returned
        if function.__name__ == "__init__":
            return _Constructor(taking, options)  # type: ignore[arg-type]
        taking.__doc__ = with_args(function.__doc__, options, keyword_only=keyword_only)  # type: ignore[arg-type]
        return taking

    return decorate


class _Constructor:
    """Stands for an ``__init__`` until its class is there: then it completes the class and gives way to the function.

    Args:
        function: the ``__init__``.
        options: the dataclass of what it takes.
    """

    def __init__(self, function: Callable[..., Any], options: type) -> None:
        self.function = function
        self.options = options

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self.function)
        owner.__doc__ = with_args(owner.__doc__, self.options)
        for field in ordered_fields(self.options):
            if field.name not in vars(owner):
                setattr(owner, field.name, _Attribute(field.name))


class _Attribute:
    """One option as an attribute of an object that has ``options``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.options, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        instance.options = replace(instance.options, **{self.name: value})


def ordered_fields(options: type, *, keyword_only: bool = False) -> list[Field[Any]]:
    """The fields of a dataclass in the order in which they are shown: by their metadata, positional ones first."""
    found = list(fields(options))
    for moved in [field for field in found if "after" in field.metadata]:
        found.remove(moved)
        names = [field.name for field in found]
        found.insert(names.index(moved.metadata["after"]) + 1, moved)
    return found if keyword_only else sorted(found, key=lambda field: bool(field.kw_only))


def parameters_of(options: type, *, keyword_only: bool = False) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters."""
    types = typing.get_type_hints(options)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY
            if keyword_only or field.kw_only
            else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        for field in ordered_fields(options, keyword_only=keyword_only)
    ]


def texts_of(options: type) -> dict[str, str]:
    """The text of each field, from the docstrings of the dataclass and its bases; a class has the last word."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
        name = ""
        for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else []:
            if line and not line.startswith("    "):
                break
            entry = _ENTRY.match(line)
            name = entry[1] if entry else name
            if line:
                found[name] = line if entry else f"{found[name]}\n{line}"
    missing = [field.name for field in fields(options) if field.name not in found]
    if missing:
        raise TypeError(f"the docstring of {options.__name__} says nothing of {', '.join(missing)} under Args")
    return found


def with_args(doc: str | None, options: type, *, keyword_only: bool = False) -> str:
    """A docstring whose section ``Args`` has the text of each option, in place of the one that it has for all."""
    texts = texts_of(options)
    entries = [texts[field.name] for field in ordered_fields(options, keyword_only=keyword_only)]
    lines = inspect.cleandoc(doc or "").splitlines()
    if "Args:" in lines:
        end = lines.index("Args:") + 1
        while end < len(lines) and lines[end].startswith("    "):
            end += 1
        start = next((number for number in range(end) if lines[number].startswith("    options: ")), end)
        lines[start:end] = entries
    else:
        sections = (number for number, line in enumerate(lines) if _SECTION.fullmatch(line))
        place = next(sections, len(lines))
        before = lines[:place] if place < len(lines) or not lines else [*lines, ""]
        lines = [*before, "Args:", *entries, "", *lines[place:]]
    return "\n".join(lines)
