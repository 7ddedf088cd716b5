"""A recipe as one callback, for lists that cannot take several in its place: configs of LightningCLI and of Hydra.

The Trainer calls the callbacks of a flat list, and looks for kinds of them there. So this one does not stand between
the Trainer and its own: when the first run is set up it puts the recipe's callbacks in its place in
``trainer.callbacks``, and is gone. From then on the Trainer has the list that ``lq.recipe(name, **overrides)`` at that
place would have given: the same order, the same states in checkpoints, so that runs resume from either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lq.configuration.recipe import recipe
from lq.errors import RecipeError, StateError

# Kinds that a Trainer looks for while it is built, to bring its own if there are none.
_EARLY = (Checkpoint, ProgressBar, ModelSummary, Timer)

# Kinds that a Trainer puts first.
_FIRST = (BatchSizeFinder, LearningRateFinder)


class Recipe(pl.Callback):
    """The callbacks of a recipe, with other values of their arguments, in the place where this one stands.

    In Python it does what ``*lq.recipe(name, **overrides)`` in the list does. In the YAML of a LightningCLI::

        trainer:
          callbacks:
            - class_path: lq.callbacks.Recipe
              init_args: {name: qdrop, overrides: {weights: 3, iterations: 2000}}

    and on its command line, behind whatever callbacks the configs have::

        --trainer.callbacks+ lq.callbacks.Recipe --trainer.callbacks.name qdrop --trainer.callbacks.overrides.weights 3

    In a Hydra config ``{_target_: lq.callbacks.Recipe, name: qdrop, weights: 3}``.

    Args:
        name: one of `lq.recipe_names`, or the path of a YAML file of the same form.
        overrides: new values of arguments, as for `lq.recipe`.
        trust: packages whose classes the recipe may use, as for `lq.recipe`.
        more: further overrides, by keyword.

    Until the first run is set up ``callbacks`` are the recipe's callbacks; afterwards they are also in
    ``trainer.callbacks``, and this object is not.

    Raises:
        RecipeError: as `lq.recipe`; if the recipe has a kind of callback that a Trainer looks for while it is built.

    >>> Recipe("lsq_w4a4", weights=3)
    Recipe('lsq_w4a4', weights=3)
    """

    def __init__(
        self,
        name: str,
        overrides: Mapping[str, Any] | None = None,
        *,
        trust: Sequence[str] = (),
        **more: Any,
    ) -> None:
        super().__init__()
        if overrides is not None and not isinstance(overrides, Mapping):
            raise RecipeError(f"overrides={overrides!r}: expected a mapping of arguments, such as {{'weights': 3}}")
        twice = sorted(set(overrides or {}) & set(more))
        if twice:
            raise RecipeError(f"{twice[0]!r} is given twice, in overrides and by keyword; give it once")
        self.name = name
        self.overrides = {**(overrides or {}), **more}
        self.callbacks: list[pl.Callback] = recipe(name, trust=trust, **self.overrides)
        for callback in self.callbacks:
            if isinstance(callback, (Recipe, *_EARLY)):
                kind = type(callback).__name__
                raise RecipeError(
                    f"recipe {name!r} has a {kind}, which a Trainer has to see while it is built; list the callbacks "
                    f"themselves, Trainer(callbacks=[*lq.recipe({name!r}), ...]), or put the {kind} beside Recipe"
                )

    def __repr__(self) -> str:
        said = "".join(f", {key}={value!r}" for key, value in self.overrides.items())
        return f"{type(self).__name__}({self.name!r}{said})"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make place for the recipe's callbacks, and set them up: the Trainer goes through the list it began with."""
        unfold_recipes(trainer, pl_module)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if any(callback is mine for mine in self.callbacks):
                callback.setup(trainer, pl_module, stage)


def unfold_recipes(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Put the callbacks of each `Recipe` of a Trainer in its place; the list is replaced, not changed.

    Callbacks of lq look for each other in ``trainer.callbacks`` while they are set up, so the first of them calls this.

    Raises:
        StateError: if the Trainer then has a callback twice that keeps a state.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    recipes = [one for one in callbacks if isinstance(one, Recipe)]
    if not recipes:
        return
    replaced = _replaced_by_module(module)
    found: list[pl.Callback] = []
    for one in callbacks:
        if not isinstance(one, Recipe):
            found.append(one)
            continue
        mine = [child for child in one.callbacks if not any(issubclass(kind, type(child)) for kind in replaced)]
        for child in mine:
            child.log, child.log_dict = module.log, module.log_dict  # type: ignore[attr-defined]
        found += mine
    found.sort(key=lambda one: not isinstance(one, _FIRST))  # stable
    _require_different(found, recipes)
    trainer.callbacks = found  # type: ignore[attr-defined]


def _replaced_by_module(module: pl.LightningModule) -> list[type[pl.Callback]]:
    """Kinds of callbacks that the module brings itself, in place of those of its Trainer."""
    if not is_overridden("configure_callbacks", module):
        return []
    own = module.configure_callbacks()
    return [type(one) for one in (own if isinstance(own, Sequence) else [own])]


def _require_different(callbacks: Sequence[pl.Callback], recipes: Sequence[Recipe]) -> None:
    """Raise if two callbacks would have one state in checkpoints, as the Trainer does for the list it is given."""
    seen: set[str] = set()
    for one in callbacks:
        if is_overridden("state_dict", one, parent=pl.Callback):
            if one.state_key in seen:
                said = " and ".join(map(repr, recipes))
                raise StateError(
                    f"Trainer(callbacks=...) has two {type(one).__name__} with one state, with {said}; a recipe brings "
                    "its own, so list it once"
                )
            seen.add(one.state_key)
