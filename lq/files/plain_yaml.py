"""YAML from outside: plain values, no key twice, no aliases that unfold into more than the text says."""

import re
from typing import Any

from lq.errors import DataError

# Most values of a text, aliases written out; and deepest nesting.
_VALUES, _DEPTH = 100_000, 50


def parse_yaml(text: str) -> Any:
    """The values of a YAML text. Numbers such as ``1e-3`` are numbers, as in Lightning's CLI.

    Raises:
        DataError: if it is no YAML, has a key twice, unfolds into too much, or has objects that are no plain values.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        loader.yaml_implicit_resolvers = _with_floats(loader.yaml_implicit_resolvers)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, [])
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise DataError(f"{place}no YAML of plain values: {' '.join((error.problem or str(error)).split())}") from error
    except RecursionError as error:
        raise DataError("it is nested too deeply") from error
    except DataError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DataError(f"no YAML of plain values: {' '.join(str(error).split())[:200]}") from error


def _with_floats(resolvers: dict[str, Any]) -> dict[str, Any]:
    """Resolvers of values that know numbers with an exponent and no point."""
    floats = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")
    found = {key: list(value) for key, value in resolvers.items()}
    for letter in "-+0123456789":
        found[letter] = [("tag:yaml.org,2002:float", floats), *found.get(letter, [])]
    return found


def _measure(node: Any, sizes: dict[int, int], around: list[int]) -> int:
    """Number of values in a node, aliases written out.

    Raises:
        DataError: if there are too many, if a node contains itself, or has a key twice.
    """
    place = f"line {node.start_mark.line + 1}: "
    if id(node) in around or len(around) > _DEPTH:
        raise DataError(place + ("an alias contains itself" if id(node) in around else "it is nested too deeply"))
    if id(node) not in sizes:
        pairs = node.value if node.id == "mapping" else []
        keys = [key.value for key, _ in pairs if key.id == "scalar"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{place}the key {twice[:80]!r} is there twice")
        inner = node.value if node.id == "sequence" else [part for pair in pairs for part in pair]
        sizes[id(node)] = 1 + sum(_measure(part, sizes, [*around, id(node)]) for part in inner)
    if sizes[id(node)] > _VALUES:
        raise DataError(f"{place}its aliases unfold into more than {_VALUES} values")
    return sizes[id(node)]
