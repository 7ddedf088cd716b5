"""What values from outside must look like, said once: types, keys and ranges, with errors that name the place.

A check takes a value and returns it, converted; `read` applies one to all that a file holds:

>>> point = record({"name": text, "at": array(number())})
>>> read({"name": "a", "at": [1, 2.5]}, point)
{'name': 'a', 'at': [1.0, 2.5]}
>>> read({"name": "a", "at": [1, "2"]}, point)
Traceback (most recent call last):
...
lq.errors.DataError: at 'at[1]': expected a number, got '2'
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lq.errors import DataError

T = TypeVar("T")

#: Takes a value and returns it; raises `MismatchError` if it is another than expected.
Check = Callable[[Any], Any]

#: Largest count in a file: of channels, values, samples.
COUNT = 1 << 53

# Numbers below that are finite.
_LARGEST = 1 << 1023


class MismatchError(Exception):
    """A value is not what was expected.

    Args:
        expected: what was.
        value: what is there.
    """

    def __init__(self, expected: str, value: object) -> None:
        super().__init__(expected)
        self.expected = expected
        self.value = value
        self.place = ""

    def inside(self, place: str) -> "MismatchError":
        """This error, of a part at `place` of a larger value."""
        joint = "" if not self.place or self.place.startswith("[") else "."
        self.place = f"{place}{joint}{self.place}"
        return self

    def __str__(self) -> str:
        at = f"at {self.place[:200]!r}: " if self.place else ""
        return f"{at}expected {self.expected}, got {shown(self.value)}"


def read(value: Any, check: Check) -> Any:
    """The value, checked.

    Raises:
        DataError: if it is another than expected; the message says where.
    """
    try:
        return check(value)
    except MismatchError as error:
        raise DataError(str(error)) from error


def shown(value: object) -> str:
    """A value in few letters."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    return reprlib.repr(value)


def text(value: Any) -> str:
    """A text that can be printed."""
    if not isinstance(value, str):
        raise MismatchError("a text", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MismatchError("a text in Unicode", value) from error
    return value


def boolean(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise MismatchError("true or false", value)
    return value


def integer(least: int = 0, most: int = COUNT) -> Check:
    """An integer within limits."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise MismatchError(
                f"an integer of {least} or more" if most == COUNT else f"an integer, {least}-{most}", value
            )
        return value

    return check


def number(least: float = -math.inf, *, nan: bool = False) -> Check:
    """A finite number, of at least `least`; NaN if it may be unknown."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MismatchError("a number", value)
        found = float(value) if abs(value) < _LARGEST or math.isnan(value) else math.inf
        if not (math.isfinite(found) and found >= least) and not (nan and math.isnan(found)):
            raise MismatchError("a finite number" + (f" of at least {least:g}" if math.isfinite(least) else ""), value)
        return found

    return check


def optional(check: Check) -> Check:
    """None, or what `check` takes."""
    return lambda value: None if value is None else check(value)


def choice(*values: str) -> Check:
    """One of some texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise MismatchError(" or ".join(map(repr, values)), value)
        return value

    return check


def array(check: Check, *, least: int = 0, most: int | None = None, into: Callable[[list[Any]], Any] = list) -> Check:
    """A list (or tuple) of what `check` takes, with `least` to `most` entries."""
    size = "" if not least else f" of {least}" if most == least else f" of {least} or more"

    def checked(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) < least or (most is not None and len(value) > most):
            raise MismatchError(f"a list{size}", value)
        found = []
        for i, part in enumerate(value):
            try:
                found.append(check(part))
            except MismatchError as error:
                raise error.inside(f"[{i}]") from None
        return into(found)

    return checked


def mapping(check: Check, *, key: Check = text) -> Check:
    """An object with any keys, and values that `check` takes."""

    def checked(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise MismatchError("an object", value)
        return {_at(name, key, name): _at(name, check, part) for name, part in value.items()}

    return checked


def record(fields: Mapping[str, Check], optional_fields: Mapping[str, Check] | None = None) -> Check:
    """An object with these keys and no others; `optional_fields` may be left out."""
    known = {**fields, **(optional_fields or {})}

    def checked(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise MismatchError(f"an object with {', '.join(map(repr, fields or known))}", value)
        for name in fields:
            if name not in value:
                raise MismatchError(f"the key {name!r}", value)
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
                hint = f"; did you mean {near[0]!r}?" if near else f", only {', '.join(map(repr, known))}"
                raise MismatchError(f"no key {shown(name)}{hint}", value)
        return {name: _at(name, known[name], part) for name, part in value.items()}

    return checked


def _at(name: object, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except MismatchError as error:
        raise error.inside(name if isinstance(name, str) else shown(name)) from None
