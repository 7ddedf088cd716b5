"""What a callback was made with, as text: only the arguments that are not the default."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# Objects that say more of themselves are shown by their class.
_LONG = 200


def call_of(thing: object) -> str:
    """The call that makes an object like this one, which has each argument of its class as an attribute.

    Values are shown so that Python reads them back where they are plain: numbers, text, paths (as text), lists, dicts
    and dataclasses of those.
    """
    said = []
    for name, parameter in inspect.signature(type(thing)).parameters.items():
        value = getattr(thing, name, parameter.default)
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and not _same(
            value, parameter.default
        ):
            said.append(f"{name}={_text(value)}")
    return f"{type(thing).__name__}({', '.join(said)})"


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    try:
        return type(value) is type(default) and bool(value == default)
    except Exception:  # noqa: BLE001 - of whatever a user gave, such as arrays
        return False


def _text(value: Any) -> str:
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(one)}' for key, one in value.items())}}}"
    if type(value) in (list, tuple):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(getattr(value, "__qualname__", value))
    text = repr(value)
    plain = isinstance(value, (str, int, float, type(None))) or (is_dataclass(value) and len(fields(value)) > 0)
    if plain and (len(text) <= _LONG or isinstance(value, str)):
        return text
    return text if len(text) <= _LONG and "\n" not in text and " object at 0x" not in text else type(value).__name__
