"""``lq fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a model, data and recipes by name.

Beside what every LightningCLI has, ``--recipe NAME`` appends a recipe's callbacks to those of the configs, wherever it
stands, and ``--recipe.KEY VALUE`` replaces values of its arguments; ``--config recipe:NAME`` is the same. The model is
a `TimmClassifier` unless ``--model`` names another LightningModule, the data are named by ``--data``.
"""

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lq.cli.usage import UsageError, plain, require, suggestion

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning's own use of it
require("jsonargparse", "cli")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from typing_extensions import override  # noqa: E402

from lq.callbacks.trainer.preparing import leave_checkpoints_alone, rebuild_from_checkpoint  # noqa: E402
from lq.cli import data as data_modules  # noqa: E402
from lq.cli.predictions import write_predictions  # noqa: E402
from lq.cli.timm_module import TimmClassifier  # noqa: E402
from lq.configuration.recipe import recipe, recipe_path  # noqa: E402
from lq.files import read_checkpoint, require_file  # noqa: E402

# Names of the data modules that come with the command.
_DATA = sorted(name for name in vars(data_modules) if name.endswith("Data") and name != "ImageData")

_LONGEST = 600


@dataclass
class RecipeChoice:
    """A recipe.

    Args:
        name: one of those that `lq recipes` lists, or the path of a file of that form.
        overrides: other values of its arguments.
        trust: packages whose classes the file may use.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    trust: list[str] = field(default_factory=list)


class _Parser(LightningArgumentParser):
    """A parser whose errors are one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong.

        Raises:
            UsageError: always.
        """
        said = plain(message)
        raise UsageError(said if len(said) <= _LONGEST else f"{said[: _LONGEST - 4]} ...") from ex


class _Restoring(pl.Callback):
    """Has a module restore a quantized checkpoint where no `Quantize` does."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        rebuild_from_checkpoint(pl_module, _check_fit)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        leave_checkpoints_alone(pl_module)


class QuantizationCLI(LightningCLI):
    """LightningCLI with ``--recipe``; a base for command lines of one's own.

    It takes the arguments of LightningCLI. In place of ``sys.argv`` give it ``args=arguments_of(list)``, which knows
    the short forms ``--recipe NAME``, ``--recipe.KEY VALUE`` and ``--config recipe:NAME``; without it they are
    ``--recipe.name NAME`` and ``--recipe.overrides.KEY VALUE``. Quantized checkpoints restore without the recipe.

    Example::

        QuantizationCLI(MyModule, MyData, args=arguments_of(sys.argv[1:]))
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--recipe`` and ``--predictions``."""
        parser.add_argument(
            "--recipe",
            type=RecipeChoice | None,
            default=None,
            help="a recipe whose callbacks are appended to trainer.callbacks: --recipe NAME --recipe.KEY VALUE",
        )
        parser.add_argument(
            "--predictions", type=str | None, default=None, help="with predict: CSV file of classes and probabilities"
        )

    @override
    def before_instantiate_classes(self) -> None:
        """Build the callbacks of the recipe: wrong names fail here, before a model is built."""
        self.recipe_callbacks: list[pl.Callback] = []
        chosen = self._asked("recipe")
        if chosen is not None:
            overrides = dict(vars(chosen.overrides) if hasattr(chosen.overrides, "__dict__") else chosen.overrides)
            self.recipe_callbacks = recipe(chosen.name, trust=chosen.trust, **overrides)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer, with the callbacks of the recipe behind those of the configs."""
        given = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        callbacks = [*(given if isinstance(given, list) else [given]), *self.recipe_callbacks, _Restoring()]
        return super().instantiate_trainer(**{"callbacks": callbacks, **kwargs})

    def after_predict(self) -> None:
        """Write the predictions, if that was asked for."""
        path = self._asked("predictions")
        if path is not None and self.trainer.is_global_zero:
            write_predictions(Path(path), self.trainer.predict_loop.predictions, self.datamodule)

    def _asked(self, key: str) -> Any:
        return self._get(self.config, key)


class _Command(QuantizationCLI):
    """The command line of ``lq``: a timm model unless another is named."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"model": {"class_path": f"{TimmClassifier.__module__}.{TimmClassifier.__name__}"}})

    @override
    def _parse_ckpt_path(self) -> None:
        """Nothing: what the checkpoint says of the model was put before the arguments, which can say otherwise."""


def _check_fit(module: pl.LightningModule, otherwise: bool) -> bool:
    """Whether the checkpoint knows better; `rebuild` asks only if the module has no quantizers."""
    return False


def run(name: str, arguments: list[str]) -> None:
    """Run a method of the Trainer.

    Raises:
        UsageError: for arguments that it does not have.
    """
    given = [*_model_of_checkpoint(arguments), *arguments_of(arguments)]
    _check_class_names(given)
    with _as_program():
        try:
            _command(name)(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                parser_class=_Parser,
                parser_kwargs={
                    "prog": "lq",
                    name: {"prog": f"lq {name}"},
                },
                save_config_kwargs={"overwrite": True, "config_filename": "lq_config.yaml"},
                args=[name, *given],
            )
        except UsageError as error:
            raise UsageError(f"{error}{_near(name, given)}") from error.__cause__


def _command(name: str) -> type[_Command]:
    """The command line with one of its commands alone, which is four times as quick to build."""
    methods = {name: _Command.subcommands()[name]}
    return type(f"_{name.capitalize()}", (_Command,), {"subcommands": staticmethod(lambda: methods)})


def arguments_of(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line with the short forms of recipes written out.

    Raises:
        UsageError: if there are two recipes, or values for none; if there is no recipe of that name.

    >>> arguments_of(["--recipe", "qdrop", "--recipe.weights=3", "--config", "mine.yaml"])
    ['--recipe.name=qdrop', '--recipe.overrides.weights=3', '--config', 'mine.yaml']
    >>> arguments_of(["--config", "recipe:qdrop"])
    ['--recipe.name=qdrop']
    """
    found: list[str] = []
    names: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        is_config = option in ("--config", "-c")
        if option != "--recipe" and not option.startswith("--recipe.") and not is_config:
            found.append(argument)
            continue
        if not equals:
            value = next(rest, "")
            if not value:
                raise UsageError(f"{option}: expected a value")
        if option == "--recipe" or (is_config and value.startswith("recipe:")):
            names.append(value.removeprefix("recipe:"))
            found.append(f"--recipe.name={names[-1]}")
        elif is_config:
            found += [option, value]
        else:
            key = option.removeprefix("--recipe.")
            own = key.partition(".")[0] in ("name", "overrides", "trust")
            found.append(f"--recipe.{'' if own else 'overrides.'}{key}={value}")
    if len(names) > 1:
        raise UsageError(
            f"--recipe {' and --recipe '.join(names)}: expected one recipe; further callbacks go into "
            f"trainer.callbacks, such as {{class_path: lq.callbacks.Recipe, init_args: {{name: {names[-1]}}}}}"
        )
    for name in names:
        if not Path(name).is_file():
            recipe_path(name)  # a misspelt name fails here
    return found


def _model_of_checkpoint(arguments: Sequence[str]) -> list[str]:
    """The arguments of the model that a checkpoint was saved with, for ``--ckpt_path`` without a model.

    Raises:
        DataError: if there is no such file, or it is none.
    """
    values = dict(_pairs(arguments))
    path = values.get("--ckpt_path")
    configs = any(option in ("--config", "-c") and not value.startswith("recipe:") for option, value in values.items())
    if path is None or path in ("best", "last", "hpc", "registry") or "://" in path or configs:
        return []
    if any(option == "--model" or option.startswith("--model.") for option in values):
        require_file(path)
        return []
    content = read_checkpoint(path)
    saved = dict(content.get("hyper_parameters", {})) if isinstance(content, dict) else {}
    saved.pop("_instantiator", None)
    kind = saved.pop("_class_path", None)
    if kind is None:
        raise UsageError(f"{path} does not say what model it is of; name it, --model.name resnet18")
    given = {key: value for key, value in saved.items() if value is not None}
    return [f"--model={kind}", *(f"--model.{key}={_word(value)}" for key, value in given.items())]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line with their values."""
    found = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option.startswith("-"):
            found.append((option, value if equals else after))
    return found


def _check_class_names(arguments: Sequence[str]) -> None:
    """Raise for a misspelt name of a data module of the command."""
    for option, value in _pairs(arguments):
        near = suggestion(value, _DATA)
        if option == "--data" and "." not in value and value not in _DATA and near:
            raise UsageError(f"--data {value}: there is no such data module{near}")


def _near(name: str, arguments: Sequence[str]) -> str:
    """The end of a message about options: those like the first one that is unknown."""
    given = [option for option, _ in _pairs(arguments) if option.startswith("--")]
    chosen = [value for option, value in _pairs(arguments) if option == "--data" and value in _DATA] or _DATA
    known = ["--config", "--recipe", "--ckpt_path", "--data", "--model", "--seed_everything", "--predictions"]
    known += [f"--model.{key}" for key in _parameters(TimmClassifier)]
    known += [f"--trainer.{key}" for key in _parameters(pl.Trainer)]
    known += [f"--data.{key}" for one in chosen for key in _parameters(getattr(data_modules, one))]
    for option in given:
        near = "" if option in known or option.startswith("--recipe.") else suggestion(option, known)
        if near:
            return near
    return f"; see lq {name} --help"


def _parameters(kind: Any) -> list[str]:
    return [key for key in inspect.signature(kind).parameters if key != "self"]


@contextlib.contextmanager
def _as_program() -> Iterator[None]:
    """Let LightningCLI, which is given the arguments, not see those of the program too."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = before
