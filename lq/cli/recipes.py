"""``lq recipes``: the recipes, each in a line, and one of them with other values of its arguments.

What ``lq recipes show`` prints is a recipe again: a file to edit, for ``lq.recipe`` and for LightningCLI; or the same
callbacks as Hydra writes objects.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from lq.cli.usage import Parser, UsageError
from lq.configuration.recipe import recipe_entries, recipe_names, recipe_path
from lq.errors import DataError
from lq.files import read_text
from lq.files.plain_yaml import parse_yaml
from lq.tables import Table

_EPILOG = """for example:
  lq recipes
  lq recipes show qdrop
  lq recipes show qdrop weights=3 iterations=2000 > mine.yaml
  lq recipes show qdrop weights=3 --hydra > conf/callbacks/mine.yaml

What is printed goes behind your own config of a LightningCLI (--config own.yaml --config mine.yaml): a recipe before a
config that has callbacks of its own is replaced by them. To stand anywhere among them, list lq.callbacks.Recipe there.
With --hydra it is {callbacks: [...]}, for Trainer(callbacks=list(hydra.utils.instantiate(config.callbacks)))."""


def run(name: str, arguments: list[str]) -> str:
    """List the recipes, or print one."""
    parser = Parser(
        prog=f"lq {name}",
        description="List the recipes, or print one with other values of its arguments.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("name", help="one of the names that `lq recipes` lists, or the path of a file of that form")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="other values, such as weights=3 budget=8x")
    show.add_argument("--hydra", action="store_true", help="as Hydra writes objects: {_target_: ..., weights: 3}")
    show.add_argument(
        "--trust", nargs="+", default=[], metavar="PACKAGE", help="packages of your own whose classes the file may use"
    )
    options = parser.parse_args(arguments)
    if options.command is None:
        return _list()
    return shown(options.name, overrides_of(options.overrides), trust=options.trust, hydra=options.hydra)


def overrides_of(pairs: Sequence[str]) -> dict[str, Any]:
    """The values that ``KEY=VALUE`` stand for, as in YAML.

    Raises:
        UsageError: if one is of another form, or a key is given twice.

    >>> overrides_of(["weights=3", "budget=8x", "bits=[2, 4]"])
    {'weights': 3, 'budget': '8x', 'bits': [2, 4]}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"{pair}: expected KEY=VALUE, such as weights=3")
        if key in found:
            raise UsageError(f"{pair}: {key} is given twice")
        try:
            found[key] = parse_yaml(text)
        except DataError as error:
            raise UsageError(f"{pair}: {error}") from error
    return found


def shown(name: str, overrides: dict[str, Any], *, trust: Sequence[str] = (), hydra: bool = False) -> str:
    r"""A recipe with other values of its arguments, as text.

    Args:
        name: as for `lq.recipe`.
        overrides: as for `lq.recipe`.
        trust: as for `lq.recipe`.
        hydra: write ``{callbacks: [{_target_: ...}]}`` for Hydra, in place of a recipe.

    Raises:
        RecipeError: as `lq.recipe`.

    >>> few = {"calibration_samples": 9, "outliers": 8}
    >>> print(shown("ptq_w8a8", few, hydra=True).split("# Command: ")[1].partition("\n")[2])
    # Made by: lq recipes show ptq_w8a8 calibration_samples=9 outliers=8 --hydra
    callbacks:
    - {_target_: lq.callbacks.Quantize, _convert_: all, weights: 8, activations: 8, outliers: 8, calibration_samples: 9}
    """
    import yaml

    entries = recipe_entries(name, trust=trust, **overrides)
    text = read_text(recipe_path(name, trust=trust))
    if not overrides and not hydra:
        return text.rstrip("\n")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    pairs = [f"{key}={_flow(value)}" for key, value in overrides.items()]
    made_by = shlex.join(["lq", "recipes", "show", name, *pairs, *(["--hydra"] if hydra else [])])
    indent = "" if hydra else "    "
    if hydra:
        lines = ["callbacks:", *(f"- {_flow(_target(entry))}" for entry in entries)]
    else:
        lines = ["trainer:", "  callbacks+:"]
        for entry in entries:
            class_path = yaml.safe_dump(entry["class_path"], width=10**6).splitlines()[0]
            lines += [f"{indent}- class_path: {class_path}", f"{indent}  init_args: {_flow(entry['init_args'])}"]
    return "\n".join([*comments, f"# Made by: {made_by}", *lines])


def _list() -> str:
    rows = []
    for name in recipe_names():
        first = read_text(recipe_path(name)).splitlines()[0].lstrip("# ")
        rows.append((name, first if len(first) <= 100 else f"{first[:97].rsplit(' ', 1)[0]} ..."))
    return str(Table(("recipe", "what it does"), tuple(rows), ("lq recipes show NAME prints one",)))


def _target(value: Any) -> Any:
    """Plain values of a recipe, objects written as Hydra does; their lists and mappings stay those of Python."""
    if isinstance(value, list):
        return [_target(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: _target(part) for key, part in value.items()}
    given = {key: _target(part) for key, part in (value.get("init_args") or {}).items()}
    return {"_target_": value["class_path"], "_convert_": "all", **given}


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")
