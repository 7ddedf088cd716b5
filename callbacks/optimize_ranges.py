"""Choose ranges by the loss of the whole network before training: LAPQ on training batches.

The method is `lq.calibration.loss_aware`.

It runs in ``on_fit_start``, after `Quantize` has calibrated and `AllocateBits`, if there is one, has chosen widths;
with ``Trainer(max_epochs=0)`` it is all that happens. What it found is in the callback's state, so that a resumed run,
whose ranges are in the checkpoint, searches nothing.
"""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lq.attachment.sites import activation_quantizers, require_attached
from lq.calibration.calibration import needs_calibration
from lq.calibration.loss_aware import OptimizedRanges, check_arguments, optimize_ranges
from lq.calibration.network_loss import NamedLoss, OutputLoss
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.data import calibrate_on_training_data, forward_of, reduce_over, training_batches
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.errors import SpecError, StateError
from lq.structure.forward import Forward


class OptimizeRanges(ModuleCallback):
    """Give all weights and activations the ranges of least loss, at the widths they have.

    Put it after `Quantize` and `AllocateBits`, before `FineTune`.

    Args:
        samples: training samples that the loss is measured on, over all ranks.
        loss: "kl", the divergence from the float module's outputs; "task", the cross-entropy with the classes in
            ``batch[1]``; or a callable that is given what the forward returned and the batch and returns the mean loss.
        evaluations: how often Powell's method may measure the loss; 0: choose the exponent of the error alone.
        forward: called with the module and a batch, returns the output; by default as for `Quantize`.

    Afterwards ``optimized`` is what was found, an `OptimizedRanges`.

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(4, 4, skip=True), OptimizeRanges()]).fit(module, datamodule)
    """

    def __init__(
        self,
        samples: int = 512,
        loss: NamedLoss | OutputLoss = "kl",
        evaluations: int = 300,
        *,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        check_arguments(loss, evaluations)
        if samples < 1:
            raise SpecError(f"samples={samples}; the loss needs at least 1")
        self.samples = samples
        self.loss: NamedLoss | OutputLoss = loss
        self.evaluations = evaluations
        self.forward = forward

    @override
    def _begin(self) -> None:
        self.optimized: OptimizedRanges | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the ranges, once for each module; nothing if a checkpoint brought them."""
        require_attached(pl_module, "OptimizeRanges")
        if self.optimized is not None:
            return
        if needs_calibration(pl_module):
            raise StateError(
                "OptimizeRanges needs calibrated quantizers; list Quantize before it in Trainer(callbacks=[...])"
            )
        if any(q.seen is None and q.calibrated for q in activation_quantizers(pl_module).values()):
            # their ranges came from a checkpoint, without the values behind
            calibrate_on_training_data(trainer, pl_module, self.samples, self.forward)
        with isolate_rng():
            optimized = optimize_ranges(
                pl_module,
                training_batches(trainer, self.samples, "Optimizing ranges"),
                loss=self.loss,
                evaluations=self.evaluations,
                forward=forward_of(trainer, pl_module, self.forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
            )
        give_to_averages(trainer, pl_module)
        self.optimized = optimized
        rank_zero_info(f"Optimized ranges of {type(pl_module).__name__}: {optimized}")
        values = {"ranges/loss_before": optimized.before, "ranges/loss_after": optimized.after}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was found; the ranges are in the module's own state."""
        return {"optimized": None if self.optimized is None else asdict(self.optimized)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        saved = state_dict["optimized"]
        self.optimized = None if saved is None else OptimizedRanges(**saved)
