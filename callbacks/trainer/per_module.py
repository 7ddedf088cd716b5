"""What a callback keeps of the module it ran on: with another module the same object begins as a new one would.

A callback object may be listed in several Trainers, one after the other. What it has found out (widths, ranges, images,
states of optimizers) belongs to one module, which it holds weakly: a module that is gone is forgotten, and one that
comes back finds what was done to it. ``setup`` runs before a checkpoint is restored, so that restored state belongs to
the module that is being restored.
"""

import copy
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lq.callbacks.recipe import unfold_recipes
from lq.callbacks.trainer.averages import keep_averages_exact
from lq.callbacks.trainer.figures import log_scalars
from lq.callbacks.trainer.shown import call_of


class _Known:
    """The module that a callback's attributes are about, and what they were for modules before it; all weakly.

    It does not travel to other processes, where modules are other objects.
    """

    def __init__(self) -> None:
        self.module: weakref.ref[pl.LightningModule] | None = None
        self.states: weakref.WeakKeyDictionary[pl.LightningModule, dict[str, Any]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Known, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Known":
        copied = _Known()
        copied.module = self.module
        for module, state in self.states.items():
            copied.states[module] = copy.deepcopy(state, memo)
        return copied


class ModuleCallback(pl.Callback):
    """Base of callbacks that keep something of the module they ran on.

    Subclasses set all of it in `_begin`, to what it is before there is a module; they call the ``setup``, ``teardown``
    and ``load_state_dict`` of this class where they have their own, and its ``on_fit_end`` if they have ``numbers``.

    Attributes:
        numbers: what it has found before or while training, for the loggers. They are logged when fit is over, in a row
            after those of training: a row at a step of training would be merged with that one's, or end the curves of
            loggers whose steps must rise.
        files: what it has written in this run: kind and path.
    """

    #: Whether it has changed the network after training, in this run: later than checkpoints are saved.
    changed_after_training = False

    def __init__(self) -> None:
        super().__init__()
        self._begin()
        self._of_module = tuple(vars(self))
        self._known = _Known()
        self._running = False
        self.numbers: dict[str, float] = {}
        self.files: dict[str, Path] = {}

    def __repr__(self) -> str:
        return call_of(self)

    def _begin(self) -> None:
        """Set the attributes that are about one module."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Turn to the module."""
        unfold_recipes(trainer, pl_module)
        self._turn_to(pl_module)
        self._running, self.changed_after_training = True, False
        if stage == "fit":
            self.numbers, self.files = {}, {}

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the numbers."""
        log_scalars(trainer, self.numbers)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note that the run is over."""
        self._running = False

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Outside of a run: what is restored belongs to the module of the next one."""
        if not self._running:
            self._keep()
            self._known.module = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what is known of this module, should another Trainer have shown the callback another one since."""
        keep_averages_exact(trainer, pl_module)
        known = self._known.module
        last = known() if known is not None else None
        if known is None or last is pl_module:
            return
        self._turn_to(pl_module)
        states, state = checkpoint.setdefault("callbacks", {}), self.state_dict()
        states.pop(self.state_key, None)
        if state:
            states[self.state_key] = state
        if last is not None:
            self._turn_to(last)

    def _turn_to(self, module: pl.LightningModule) -> None:
        """Have the attributes be about `module`."""
        known = self._known
        if known.module is not None and known.module() is not module:
            self._keep()
            if module in known.states:
                vars(self).update(known.states.pop(module))
            else:
                self._begin()
        known.module = weakref.ref(module)

    def _keep(self) -> None:
        """Put the attributes aside for when their module comes back, if it still exists."""
        last = None if self._known.module is None else self._known.module()
        if last is not None:
            self._known.states[last] = {name: vars(self)[name] for name in self._of_module}
