"""Recipes: YAML fragments of callbacks under a name, for Python and for Lightning's CLI alike.

A recipe executes nothing: it names callbacks of lq and Lightning, or of packages that the caller trusts, and their
arguments. Names are checked before anything is imported, classes before anything is called.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lq.configuration.arguments import misfit
from lq.errors import DataError, LqError, RecipeError
from lq.files import read_text, schema
from lq.files.plain_yaml import parse_yaml

_FOLDER = Path(__file__).parents[1] / "recipes"

# Where callbacks come from.
_LIGHTNING = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
_PACKAGES = ("lq.callbacks", *_LIGHTNING)

# Where objects among their arguments may come from in addition: lq's public names.
_OBJECTS = ("lq",)

# Largest recipe, in bytes.
_LIMIT = 1 << 18

_ENTRY = schema.record({"class_path": schema.text}, {"init_args": schema.optional(schema.mapping(lambda value: value))})
_RECIPE = schema.record({"trainer": schema.record({"callbacks+": schema.array(_ENTRY)})})


def recipe_names() -> list[str]:
    """Names of the recipes that come with lq.

    >>> "ptq_w8a8" in recipe_names()
    True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe(name: str, *, trust: Sequence[str] = (), **overrides: Any) -> list[Any]:
    """The callbacks of a recipe, for ``Trainer(callbacks=...)``.

    Args:
        name: one of `recipe_names`, or the path of a YAML file of the same form.
        trust: packages or modules, such as ``["mypackage.callbacks"]``, whose classes the recipe may use besides
            callbacks of lq and Lightning.
        overrides: new values of arguments; each replaces what the recipe says, or else, if it says nothing, reaches
            every callback that has an argument of that name.

    Raises:
        RecipeError: if there is no such recipe, if it names something else than callbacks, or wrong arguments; if no
            callback of it takes an override.

    >>> [type(callback).__name__ for callback in recipe("lsq_w4a4", weights=3)]
    ['Quantize', 'FineTune']
    """
    path = _path(name)
    made = []
    for cls, entry, mine in _planned(name, path, trust, overrides):
        own = {key: value for key, value in entry["init_args"].items() if key not in mine}
        made.append(_made(cls, own, mine, trust, path))
    return made


def recipe_entries(name: str, *, trust: Sequence[str] = (), **overrides: Any) -> list[dict[str, Any]]:
    """The callbacks of a recipe as plain values, overrides among them: what `recipe` builds, to be written to a file.

    Args:
        name: as for `recipe`.
        trust: as for `recipe`.
        overrides: as for `recipe`.

    Returns:
        For each callback ``{"class_path": ..., "init_args": {...}}``.

    Raises:
        RecipeError: as `recipe`.

    >>> recipe_entries("ptq_w8a8", weights=4)[0]["init_args"]["weights"]
    4
    """
    path = _path(name)
    recipe(name, trust=trust, **overrides)  # wrong values fail here
    return [
        {
            "class_path": entry["class_path"],
            "init_args": {**{key: mine.get(key, value) for key, value in entry["init_args"].items()}, **mine},
        }
        for _, entry, mine in _planned(name, path, trust, overrides)
    ]


def _planned(
    name: str, path: Path, trust: Sequence[str], overrides: dict[str, Any]
) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """For each callback of a recipe its class, what the file says, and the overrides that reach it."""
    entries = _entries(path)
    for entry in entries:
        _require_trusted(entry["class_path"], trust, path)
    classes = [_callback(entry["class_path"], path) for entry in entries]
    accepted = [_arguments(cls) for cls in classes]
    for key in overrides:
        if not any(key in arguments for arguments in accepted):
            known = sorted(set().union(*accepted))
            near = difflib.get_close_matches(key, known, n=3) or known
            raise RecipeError(f"no callback of recipe {name!r} takes {key!r}; did you mean {', '.join(near)}?")
    given = [set(entry["init_args"]) for entry in entries]
    takers = {key: given if any(key in names for names in given) else accepted for key in overrides}
    return [
        (cls, entry, {key: value for key, value in overrides.items() if key in takers[key][index]})
        for index, (cls, entry) in enumerate(zip(classes, entries, strict=True))
    ]


def recipe_path(name: str, *, trust: Sequence[str] = ()) -> Path:
    """The YAML file of a recipe, to pass as ``--config`` to a LightningCLI.

    Args:
        name: one of `recipe_names`, or the path of a YAML file of the same form.
        trust: as for `recipe`.

    Raises:
        RecipeError: if there is no such recipe, or it names something else than callbacks.
    """
    path = _path(name)
    entries = _entries(path)
    for entry in entries:
        _require_trusted(entry["class_path"], trust, path)
        for class_path in _objects(entry["init_args"]):
            _require_trusted(class_path, trust, path, _OBJECTS)
    for entry in entries:
        _callback(entry["class_path"], path)
    return path


def _path(name: str) -> Path:
    """The file of a recipe."""
    if not isinstance(name, (str, Path)):
        raise RecipeError(f"a recipe is given by its name or the path of a file, not by {schema.shown(name)}")
    for path in (_FOLDER / f"{name}.yaml", Path(name)):
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name too long, or with a zero byte
            continue
    near = difflib.get_close_matches(str(name), recipe_names(), n=3) or recipe_names()
    raise RecipeError(f"there is no recipe {name!r}; did you mean {', '.join(near)}?")


def _entries(path: Path) -> list[dict[str, Any]]:
    """The callback entries of a recipe file."""
    try:
        content = parse_yaml(read_text(path, limit=_LIMIT))
        entries = schema.read(content, _RECIPE)["trainer"]["callbacks+"]
    except DataError as error:
        raise RecipeError(
            f"{path.name} is no recipe: expected callbacks under 'trainer', 'callbacks+', each with a class_path; "
            f"{error}"
        ) from error
    return [{"class_path": entry["class_path"], "init_args": entry.get("init_args") or {}} for entry in entries]


# --- what may be used -------------------------------------------------------------------------------------------------


def _require_trusted(class_path: object, trust: Sequence[str], path: Path, modules: Sequence[str] = ()) -> None:
    """Raise if a name is not one in a package that is trusted, or in `modules`; nothing is imported for that."""
    if isinstance(trust, str) or not isinstance(trust, Collection):
        raise RecipeError(f"trust={trust!r}: expected a list of packages, such as {[trust or 'mypackage']!r}")
    words = class_path.split(".") if isinstance(class_path, str) else []
    if len(words) < 2 or not all(word.isidentifier() and not word.startswith("_") for word in words):
        given = schema.shown(class_path)
        raise RecipeError(f"{path.name}: {given} is no name of a class, such as lq.callbacks.Quantize")
    module = ".".join(words[:-1])
    if module not in modules and not any(_is_in(module, package) for package in (*_PACKAGES, *trust)):
        near = difflib.get_close_matches(module, _PACKAGES, n=1, cutoff=0.8)
        hint = f" (did you mean {near[0]}.{words[-1]}?)" if near else ""
        raise RecipeError(
            f"{path.name}: {class_path} is none of the callbacks of lq and Lightning{hint}; nothing of it was "
            "imported. If it is of a package that you trust, name that in lq.recipe(..., trust=[...])"
        )


def _is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _callback(class_path: str, path: Path) -> Any:
    """The class of a callback."""
    cls = _attribute(class_path, path)
    bases = tuple(sys.modules[name].Callback for name in _LIGHTNING if name in sys.modules)
    if not (inspect.isclass(cls) and issubclass(cls, bases)):
        raise RecipeError(f"{path.name}: {class_path} is no callback: it is no class derived from Lightning's Callback")
    return cls


def _attribute(class_path: str, path: Path) -> Any:
    """What is under a name in a module."""
    module_name, _, name = class_path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # what a module raises when it is imported
        raise RecipeError(f"{path.name}: {class_path} cannot be imported: {' '.join(str(error).split())}") from error
    if name not in vars(module):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, classes, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise RecipeError(f"{path.name}: {module_name} has no {name}{hint}")
    return vars(module)[name]


# --- what is made of it -----------------------------------------------------------------------------------------------


def _made(cls: Any, own: dict[str, Any], overrides: dict[str, Any], trust: Sequence[str], path: Path) -> Any:
    """An object of a class with the arguments of a recipe, and others that the caller gives."""
    known = _arguments(cls)
    for key, value in own.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3) or known
            raise RecipeError(f"{path.name}: {cls.__name__} takes no {key!r}; did you mean {', '.join(near)}?")
        own[key] = _value(value, trust, path)
        expected = misfit(cls, key, own[key])
        if expected is not None:
            got = schema.shown(own[key])
            raise RecipeError(f"{path.name}: {cls.__name__}({key}=...): expected {expected}, got {got}")
    try:
        return cls(**own, **overrides)
    except Exception as error:  # what a constructor raises
        if overrides and isinstance(error, LqError):
            raise
        said = ", ".join(f"{key}={schema.shown(value)}" for key, value in own.items())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{path.name}: {cls.__name__}({said}): {reason}") from error


def _value(value: Any, trust: Sequence[str], path: Path) -> Any:
    """A value of a recipe; mappings with a class_path, as LightningCLI writes objects, become these objects."""
    if isinstance(value, list):
        return [_value(part, trust, path) for part in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: _value(part, trust, path) for key, part in value.items()}
    try:
        entry = schema.read(value, _ENTRY)
    except DataError as error:
        raise RecipeError(f"{path.name}: an object in its arguments: {error}") from error
    class_path = entry["class_path"]
    _require_trusted(class_path, trust, path, _OBJECTS)
    cls = _attribute(class_path, path)
    if not inspect.isclass(cls) or not any(_is_in(cls.__module__, package) for package in ("lq", *_PACKAGES, *trust)):
        raise RecipeError(f"{path.name}: {class_path} is no class of lq or of a package that is trusted")
    return _made(cls, dict(entry.get("init_args") or {}), {}, trust, path)


def _objects(value: Any) -> list[Any]:
    """Names of the classes of objects among arguments."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value["class_path"]] if isinstance(value, dict) and "class_path" in value else []
    return [*own, *(name for part in parts for name in _objects(part))]


def _arguments(cls: Any) -> list[str]:
    """Names of the arguments of a class; those behind ``**kwargs`` are not among them."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in inspect.signature(cls).parameters.items() if parameter.kind not in kinds]
