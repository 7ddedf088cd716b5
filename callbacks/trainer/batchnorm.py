"""BatchNorm statistics while a quantized module is trained: frozen from an epoch on, measured anew in the end."""

import warnings
from dataclasses import dataclass

import lightning.pytorch as pl

from lq.calibration.batchnorm import batchnorms, reestimate_batchnorm
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.errors import NoEffectWarning


@dataclass
class BatchNormStatistics:
    """What happens to the statistics of all BatchNorms of a module.

    Args:
        freeze_epoch: first epoch in which they no longer change; None: they always do.
        samples: training samples to measure them on when training ends; 0: keep the running ones.
        measured_at: step at which they were measured.
    """

    freeze_epoch: int | None
    samples: int
    measured_at: int = -1

    def check(self, module: pl.LightningModule) -> None:
        """Warn if there is something to do, and no BatchNorm to do it to."""
        if (self.freeze_epoch is not None or self.samples) and not batchnorms(module):
            warnings.warn(
                "freeze_bn_epoch and reestimate_bn have nothing to do: the module has no BatchNorm "
                "(use Quantize(fold_bn=False) to keep them)",
                NoEffectWarning,
                stacklevel=3,
            )

    def freeze(self, module: pl.LightningModule, epoch: int) -> None:
        """Freeze them if it is time; Lightning sets the mode of the module before each epoch."""
        if self.freeze_epoch is not None and epoch >= self.freeze_epoch:
            for norm in batchnorms(module):
                norm.eval()

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure them on training data, once for each step that training may end at."""
        if not self.samples or self.measured_at == trainer.global_step or not batchnorms(module):
            return
        with progress_of(trainer):
            reestimate_batchnorm(
                module,
                training_batches(trainer, self.samples, "Measuring BatchNorm"),
                forward=forward_of(trainer, module, None),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
                ranks=trainer.world_size,
            )
        self.measured_at = trainer.global_step
