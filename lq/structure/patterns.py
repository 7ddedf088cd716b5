"""Choosing layers by name pattern; a pattern that matches nothing is an error with near misses."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from lq.errors import PatternError


def ancestors(name: str) -> list[str]:
    """The name and the names of the modules around it, innermost first.

    >>> ancestors("layer1.0.conv1")
    ['layer1.0.conv1', 'layer1.0', 'layer1']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def matches(pattern: str, name: str) -> bool:
    """Whether shell-style `pattern` matches the layer or a module around it.

    >>> matches("layer1", "layer1.0.conv1"), matches("*.conv?", "layer1.0.conv1"), matches("conv1", "layer1.0.conv1")
    (True, True, False)
    """
    return any(fnmatchcase(part, pattern) for part in ancestors(name))


def only_matching(patterns: Iterable[str], names: Iterable[str], others: Iterable[str]) -> set[str]:
    """The names that patterns match which match none of `others`: patterns that were written for these names.

    >>> only_matching(["teacher", "*"], ["teacher.fc"], ["net.fc"]), only_matching(["*"], ["teacher.fc"], ["net.fc"])
    ({'teacher.fc'}, set())
    """
    others, names = list(others), list(names)
    own = [pattern for pattern in patterns if not any(matches(pattern, name) for name in others)]
    return {name for name in names if any(matches(pattern, name) for pattern in own)}


def select(patterns: Sequence[str] | str, names: Iterable[str], *, argument: str) -> set[str]:
    """The names that any of the patterns matches.

    Raises:
        PatternError: if one of them matches none; `argument` says where it was given.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if matches(pattern, name)}
        if not found:
            raise PatternError(_nothing_found(pattern, names, argument))
        chosen |= found
    return chosen


def _nothing_found(pattern: str, names: list[str], argument: str) -> str:
    known = list(dict.fromkeys(part for name in names for part in ancestors(name)))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    near += [name for name in known if pattern.strip("*.") and pattern.strip("*.") in name and name not in near][:3]
    near = near or known[:3]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "the model has no layer to quantize"
    return f"{argument} pattern {pattern!r} matches none of the {len(names)} layers; {hint}"
