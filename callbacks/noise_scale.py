"""Learn the noise scale of every tensor or channel along with the network, and with it the widths.

The callback is `FineTune` with one thing more: beside steps, ranges are learned, so that widths are real numbers
(`lq.training.noise_scale`). A penalty and a falling ceiling bring them to their targets, or their total to a budget;
then they become integers, for good, and training goes on with the steps alone. Checkpoints and validations after that
are of the model that will be exported; those before it have widths between integers.
"""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lq.attachment.sites import quantizers
from lq.attachment.summary import summary
from lq.callbacks.finetune import FineTune
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.final_widths import ChangesWidths
from lq.callbacks.trainer.optimizers import QuantizerOptimizer, adam, loss_scale, steps_of
from lq.callbacks.trainer.training_options import RATE, LearnNoiseScaleOptions
from lq.callbacks.trainer.width_descent import WidthDescent
from lq.options import takes
from lq.quantizer.estimators import NoiseScale
from lq.training.noise_scale import prune_silent

# Learning rate of steps and ranges, in octaves per update: what takes them so many octaves in the run, at most.
_TRAVEL, _FASTEST = 6.0, 3e-2


class LearnNoiseScale(ChangesWidths, FineTune):
    """Train a quantized module with learned noise scales: widths come down to targets, or share a budget.

    Widths start where `Quantize` (or `AllocateBits`) has put them: 8 bits, say. Channels that come to less than half a
    bit, or that are all zeros in the end, are pruned. The user's optimizer is kept unless `lr` is given, which replaces
    it by RAdam.

    Example::

        Trainer(max_epochs=30, callbacks=[Quantize(8, 8, fold_bn=False), LearnNoiseScale(weights=2, activations=2)])
    """

    _default_owner = 0

    options: LearnNoiseScaleOptions

    @takes(LearnNoiseScaleOptions)
    def __init__(self, options: LearnNoiseScaleOptions) -> None:
        super().__init__(NoiseScale(widths=True))
        self.options = options

    @override
    def _begin(self) -> None:
        super()._begin()
        self._descent: WidthDescent | None = None
        self._loss: Tensor | None = None

    def widths(self) -> dict[str, float]:
        """The width ``I_alpha`` of each tensor now, in bits, the mean over its channels; by name."""
        return {} if self._descent is None else self._descent.widths()

    @override
    def _choose(self, module: pl.LightningModule) -> None:
        self._estimator = NoiseScale(widths=True)
        super()._choose(module)

    @override
    def _own_optimizer(self, trainer: pl.Trainer, module: pl.LightningModule) -> QuantizerOptimizer:
        saved = self._resumed.get("noise_scale")
        self._descent = WidthDescent(module, trainer.optimizers, self.options, saved)
        if self._descent.settled_at is not None:
            self._use_integers(module)
        if saved is None:
            give_to_averages(trainer, module)
        return self._optimizer_of(self._descent, self.options.rate)

    @staticmethod
    def _optimizer_of(descent: WidthDescent, rate: float) -> QuantizerOptimizer:
        return QuantizerOptimizer(descent.parameters, rate, adam(rate))

    @override
    def _targets_met_at(self) -> int | None:
        return None if self._descent is None else self._descent.met_at

    @override
    def _arrange(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Widths come down together, whatever is frozen: all quantizers stay with the optimizer they began with."""

    @override
    def _final(self) -> bool:
        return self._descent is None or self._descent.final

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the loss rise without a word as long as widths come down."""
        super().on_train_start(trainer, pl_module)
        if self._watch is not None:
            self._watch.expects_rise = not self._final()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss that the penalty is measured by."""
        super().on_before_backward(trainer, pl_module, loss)
        self._loss = loss.detach() * trainer.accumulate_grad_batches
        if self._distillation.loss is not None:
            self._loss = self._distillation.loss
        if trainer.world_size > 1 and not self._final():  # widths have to stay the same on all ranks
            self._loss = trainer.strategy.reduce(self._loss.clone(), reduce_op="mean")

    @override
    def _step_own(self, trainer: pl.Trainer, index: int, factor: float) -> None:
        own, descent = self._own, self._descent
        learner = None if descent is None else descent.learner_of(index)
        if own is None or descent is None or learner is None:
            return
        if not descent.planned:
            self._plan(own, descent, steps_of(trainer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        optimize = partial(own.step, learner, factor, scaler)
        if descent.settled_at is not None:
            descent.step_alone(learner, optimize)
        elif descent.step(learner, optimize, self._loss, loss_scale(trainer), trainer.global_step):
            self._settle(trainer, descent)

    def _plan(self, own: QuantizerOptimizer, descent: WidthDescent, total: float) -> None:
        """Spread the way of the widths over the length of the run, and with it the rates."""
        descent.plan(total)
        if self.options.quantizer_lr is None:
            own.lr = max(RATE, min(_TRAVEL / total, _FASTEST))
            descent.penalty.growth = 2 * own.lr

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the widths: means over values of weights, and over activations."""
        for name, bits in self._descent.means().items() if self._descent is not None else ():
            pl_module.log(name, bits, prog_bar=True)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make widths integers if training ended before its time; prune channels that are all zeros by now."""
        if self._descent is not None and not self._descent.final:
            self._settle(trainer, self._descent)
        prune_silent(pl_module)
        super().on_train_end(trainer, pl_module)

    def _settle(self, trainer: pl.Trainer, descent: WidthDescent) -> None:
        """Make all widths integers; from now on steps are learned alone."""
        module = trainer.lightning_module
        descent.settle(module, trainer.global_step)
        self._use_integers(module)
        if self._own is not None:  # what gradients were on the way down is no measure of what they are now
            self._own = self._optimizer_of(descent, self._own.lr)
        if self._watch is not None:
            self._watch.restart()
            self._watch.expects_rise = False
        give_to_averages(trainer, module)
        rank_zero_info(f"Learned the widths of {type(module).__name__}: {summary(module).total()}")

    def _use_integers(self, module: pl.LightningModule) -> None:
        """Learn the steps alone. What DDP expects a gradient of keeps being part of the graph."""
        self._estimator = NoiseScale()
        for quantizer in quantizers(module):
            quantizer.estimator = self._estimator

    @override
    def state_dict(self) -> dict[str, Any]:
        """That of `FineTune`, what is learned to the bit, and how far the widths have come."""
        state = super().state_dict()
        if self._descent is not None and self._descent.learners:
            state["noise_scale"] = self._descent.state()
        return state
