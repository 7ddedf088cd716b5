"""Recipes: YAML fragments of callbacks under a name, for Python and for Lightning's CLI alike."""

import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any

from lq.errors import RecipeError

_FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with lq.

    >>> "ptq_w8a8" in recipe_names()
    True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe(name: str, **overrides: Any) -> list[Any]:
    """The callbacks of a recipe, for ``Trainer(callbacks=...)``.

    Args:
        name: one of `recipe_names`, or the path of a YAML file of the same form.
        overrides: new values of arguments; each replaces what the recipe says, or else, if it says nothing, reaches
            every callback that has an argument of that name.

    Raises:
        RecipeError: if there is no such recipe, or no callback of it takes an override.

    >>> [type(callback).__name__ for callback in recipe("lsq_w4a4", weights=3)]
    ['Quantize', 'FineTune']
    """
    entries = _entries(name)
    classes = [_import(entry["class_path"]) for entry in entries]
    accepted = [set(inspect.signature(cls).parameters) for cls in classes]
    for key in overrides:
        if not any(key in arguments for arguments in accepted):
            known = sorted(set().union(*accepted))
            near = difflib.get_close_matches(key, known, n=3) or known
            raise RecipeError(f"no callback of recipe {name!r} takes {key!r}; did you mean {', '.join(near)}?")
    given = [set(entry["init_args"]) for entry in entries]
    takers = {key: given if any(key in names for names in given) else accepted for key in overrides}
    return [
        cls(**{**entry["init_args"], **{key: value for key, value in overrides.items() if key in takers[key][index]}})
        for index, (cls, entry) in enumerate(zip(classes, entries, strict=True))
    ]


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe, to pass as ``--config`` to a LightningCLI."""
    for path in (_FOLDER / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, recipe_names(), n=3) or recipe_names()
    raise RecipeError(f"there is no recipe {name!r}; did you mean {', '.join(near)}?")


def _entries(name: str) -> list[dict[str, Any]]:
    """The callback entries of a recipe file."""
    import yaml

    path = recipe_path(name)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        entries = content["trainer"]["callbacks+"]
        return [{"class_path": entry["class_path"], "init_args": entry.get("init_args") or {}} for entry in entries]
    except (TypeError, KeyError, AttributeError) as error:
        raise RecipeError(
            f"{path.name} is no recipe: expected callbacks under 'trainer', 'callbacks+', each with a class_path"
        ) from error


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)
