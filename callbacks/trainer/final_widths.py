"""Scores of networks whose widths are not final: they compete neither for the best checkpoint nor in early stopping.

A network with more bits than were asked for is better than it will be. Until widths are final, EarlyStopping begins
anew at every check (a metric that is not finite still ends the run); then it and ModelCheckpoint forget the scores they
have, and once more those that were measured while widths still changed. What is saved before knows that it is
unfinished (`lq.quantizer.final_widths`). Schedulers that watch a metric, such as ReduceLROnPlateau, are left alone: to
them a metric that gets worse as widths come down is a plateau.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lq.callbacks.trainer.checkpoints import class_names, forget_scores, model_checkpoints, worst_score
from lq.callbacks.trainer.per_module import ModuleCallback


class ChangesWidths(ModuleCallback):
    """Base of callbacks that change widths while training; they say in `_final` when that is over."""

    @override
    def _begin(self) -> None:
        super()._begin()
        self._was_final = True  # after the last step
        self._epoch_is_mixed = False  # metrics of this epoch are in part of unfinished networks
        self._validation_is_old = False  # so are those of the last validation
        self._before: dict[str, Tensor] = {}  # all metrics before a validation
        self._validated: set[str] = set()  # those that validations have measured since widths are final
        self._thresholds: list[tuple[Any, float]] = []

    def _final(self) -> bool:
        """Whether widths are those that were asked for."""
        return True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether there is anything to wait for."""
        super().on_train_start(trainer, pl_module)
        self._was_final = self._final()
        self._epoch_is_mixed = self._validation_is_old = False
        self._hold_early_stopping(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget all scores when widths become final."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._was_final and self._final():
            self._was_final = self._epoch_is_mixed = self._validation_is_old = True
            self._validated = set()
            for callback in (*model_checkpoints(trainer), *_early_stoppings(trainer)):
                _forget(callback)
            if not _in_motion(trainer):
                for other in trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(other, ChangesWidths):
                        other._give_thresholds_back()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have EarlyStopping begin anew; note the metrics that the validation may change."""
        super().on_validation_start(trainer, pl_module)
        self._hold_early_stopping(trainer)
        if self._epoch_is_mixed or self._validation_is_old:
            self._before = dict(trainer.callback_metrics)
        if self._validation_is_old:
            for callback in _early_stoppings(trainer):
                _forget(callback)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget scores of the validation before, which other checkpoints may have been given since."""
        super().on_validation_end(trainer, pl_module)
        if not (self._epoch_is_mixed or self._validation_is_old):
            return
        for name, value in trainer.callback_metrics.items():
            if name not in self._before or not torch.equal(value, self._before[name]):
                self._validated.add(name)
        if self._validation_is_old:
            for callback in model_checkpoints(trainer):  # Lightning calls them after all others
                if callback.monitor in self._validated:
                    _forget(callback)
        self._validation_is_old = False

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget scores of an epoch in which widths changed."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._epoch_is_mixed:
            self._epoch_is_mixed = False
            for callback in (*model_checkpoints(trainer), *_early_stoppings(trainer)):
                if callback.monitor not in self._validated:
                    _forget(callback)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have EarlyStopping begin anew; Lightning calls it after this."""
        super().on_train_epoch_end(trainer, pl_module)
        self._hold_early_stopping(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave EarlyStopping as it was."""
        super().teardown(trainer, pl_module, stage)
        self._give_thresholds_back()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave EarlyStopping as it was."""
        super().on_exception(trainer, pl_module, exception)
        self._give_thresholds_back()

    def _hold_early_stopping(self, trainer: pl.Trainer) -> None:
        """As long as widths are not final, forget what EarlyStopping has seen, and the score that it may stop at."""
        if self._final():
            return
        for callback in _early_stoppings(trainer):
            _forget(callback)
            if callback.stopping_threshold is not None:
                self._thresholds.append((callback, callback.stopping_threshold))
                callback.stopping_threshold = None

    def _give_thresholds_back(self) -> None:
        for callback, threshold in self._thresholds:
            callback.stopping_threshold = threshold
        self._thresholds = []


def _early_stoppings(trainer: pl.Trainer) -> list[Any]:
    return [one for one in trainer.callbacks if "EarlyStopping" in class_names(one)]  # type: ignore[attr-defined]


def _in_motion(trainer: pl.Trainer) -> bool:
    """Whether a callback is still going to change widths."""
    return any(isinstance(one, ChangesWidths) and not one._final() for one in trainer.callbacks)  # type: ignore[attr-defined]


def _forget(callback: Any) -> None:
    """Forget the scores of a ModelCheckpoint or an EarlyStopping."""
    if "EarlyStopping" in class_names(callback):
        callback.best_score, callback.wait_count = torch.tensor(worst_score(callback)), 0
    else:
        forget_scores(callback)
