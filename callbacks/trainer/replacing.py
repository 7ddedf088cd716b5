"""Put an optimizer and schedules of lq in place of those of ``configure_optimizers``, where options ask for it."""

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lq.callbacks.trainer.optimizers import steps_of
from lq.callbacks.trainer.schedules import cosine, noise_scale, scheduler
from lq.callbacks.trainer.training_options import TrainingOptions
from lq.errors import SpecError, StateError


def replace_optimizers(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    options: TrainingOptions,
    ours: set[int],
) -> None:
    """Replace the user's optimizers, and with them their schedulers, by one, if ``lr`` is given.

    Args:
        trainer: the Trainer, which has its optimizers.
        module: the module that it trains.
        options: ``lr`` and ``schedule``.
        ours: identities of the parameters of quantizers, which it does not get.

    Raises:
        StateError: if the module steps its optimizers itself.
    """
    if (options.lr is not None or options.schedule is not None) and not module.automatic_optimization:
        raise StateError(
            "lr= and schedule= replace the optimizer of automatic optimization, but this module steps its own; "
            "leave them out and set both in configure_optimizers"
        )
    if options.lr is not None:
        weights = [p for p in module.parameters() if p.requires_grad and id(p) not in ours]
        trainer.strategy.optimizers = [options.optimizer(weights, options.lr)]
        trainer.strategy.lr_scheduler_configs = []


def replace_schedulers(trainer: pl.Trainer, options: TrainingOptions, met_at: Callable[[], int | None]) -> None:
    """Replace the schedulers of all optimizers, if ``schedule`` is given.

    Args:
        trainer: the Trainer, which has its optimizers.
        options: ``schedule`` and ``warmup``.
        met_at: tells the step at which all widths were at their targets; None: they are not yet.

    Raises:
        SpecError: if a cosine has no end.
    """
    if options.schedule is None:
        return
    if options.schedule == "cosine" and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise SpecError("schedule='cosine' needs the number of steps; set max_epochs or max_steps on the Trainer")

    def factor(step: int) -> float:
        if not step:
            return 1.0
        total = steps_of(trainer)
        return cosine(step, total) if options.schedule == "cosine" else noise_scale(step, total, met_at())

    trainer.strategy.lr_scheduler_configs = [
        LRSchedulerConfig(scheduler(optimizer, factor, options.warmup), interval="step")
        for optimizer in trainer.optimizers
    ]
