"""How the command says that it was called wrongly: in one line, with what was probably meant, and exit code 2."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from typing_extensions import override

from lq.bars import show_progress
from lq.errors import LqError


class UsageError(LqError):
    """The command was called with arguments that it does not have."""


def progress() -> AbstractContextManager[None]:
    """Bars of what runs inside, where somebody looks: on a terminal."""
    return show_progress() if sys.stderr.isatty() else nullcontext()


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors are one line."""

    @override
    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in one line.

        Raises:
            SystemExit: with code 2.
        """
        words = [word for word in message.split() if word.startswith("--")]
        options = [option for action in self._actions for option in action.option_strings]
        near = [hint for word in words if "unrecognized" in message and (hint := suggestion(word, options))]
        print(f"{self.prog}: {one_line(message)}{near[0] if near else f'; see {self.prog} --help'}", file=sys.stderr)
        raise SystemExit(2)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: those that are like it, if any are.

    >>> suggestion("qdrp", ["qdrop", "nwq"])
    '; did you mean qdrop?'
    >>> suggestion("zzz", ["qdrop", "nwq"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def one_line(error: object) -> str:
    """A message in one line; of an error without one, the name of its class."""
    return " ".join(str(error).split()) or type(error).__name__


def plain(message: str) -> str:
    r"""What a parser of typed arguments says, in fewer words.

    >>> text = "Does not validate against any of the Union subtypes\nSubtypes: [int]\nErrors:\n"
    >>> text += "- Expected a <class 'int'>"
    >>> plain(f'Parser key "trainer.max_epochs": {text}\nGiven value type: <class \'str\'>\nGiven value: many')
    '--trainer.max_epochs: expected int, got many'
    """
    text = one_line(message)
    text = re.sub(r'^Parser key "([\w.]+)": ', r"--\1: ", text)
    key, _, rest = text.partition("Does not validate against any of the Union subtypes Subtypes: ")
    if not rest:
        return text
    errors, _, value = rest.partition(" Errors: ")[2].rpartition(" Given value type: ")
    value = value.partition("Given value: ")[2]
    parts = [part.strip(" -") for part in re.split(r" (?=- )|^- ", errors) if part.strip(" -")]
    kinds = [match[1] for part in parts if (match := re.fullmatch(r"Expected a <class '([\w.]+)'>", part))]
    others = [part for part in parts if not part.startswith("Expected a <class")]
    kinds = [kind for kind in kinds if kind != "NoneType"]
    said = "; ".join(others) or f"expected {' or '.join(kinds)}, got {value}"
    return f"{key}{said}"


def require(package: str, extra: str, name: str | None = None) -> None:
    """Raise if a package is not installed.

    Args:
        package: name that it is imported by.
        extra: the extra of lq that brings it.
        name: what to call it, if it has another name.

    Raises:
        UsageError: saying how to install it.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UsageError(f"this needs {name or package}, which is not installed: pip install 'lq-lightning[{extra}]'")
