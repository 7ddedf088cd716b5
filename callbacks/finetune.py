"""Fine-tune a quantized module: the user's training goes on, quantizer parameters get an optimizer of their own.

What an estimator learns of the quantizers (`lq.quantizer.estimators`) are ordinary parameters of the module, but an
optimizer that trains weights must not move them (its decay and learning rate are meant for weights). They are taken
out of the user's optimizers, then and whenever groups are added or optimizers replaced, and stepped by an Adam of
their own whenever the user's optimizer of their layer steps: what is learned of a layer that is unfrozen later is
trained from then on. Its learning rate follows the user's schedule in proportion; its state is in the callback's, so
that a resumed run continues it.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lq.attachment.attach import set_estimator
from lq.attachment.sites import is_attached, quantizers, require_attached
from lq.callbacks.freeze_oscillations import FreezeOscillations
from lq.callbacks.quantize import Quantize
from lq.callbacks.trainer.batchnorm import BatchNormStatistics
from lq.callbacks.trainer.dampening import Dampening
from lq.callbacks.trainer.distilling import Distillation
from lq.callbacks.trainer.divergence import DivergenceWatch
from lq.callbacks.trainer.optimizers import QuantizerOptimizer, UserOptimizers, adam
from lq.callbacks.trainer.ownership import (
    forget_stale_gradients,
    freeze_with_weights,
    learned,
    learned_by_optimizer,
    quantizer_parameters,
    unfreeze_with_weights,
)
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.pruning import check_parametrizations, prune_float_weights
from lq.callbacks.trainer.replacing import replace_optimizers, replace_schedulers
from lq.callbacks.trainer.training_options import FineTuneOptions, TrainingOptions
from lq.callbacks.trainer.untrained import UntrainedWeights, build_as_float
from lq.callbacks.trainer.zero_points import finish_zero_points, hold_zero_points
from lq.options import takes
from lq.quantizer.estimators import estimator as estimator_of


class FineTune(ModuleCallback):
    """Train a quantized module with the straight-through estimator or with learned steps (LSQ and others).

    Without further arguments the user's optimizer and scheduler are kept. ``FineTune(lr=0.005, schedule="cosine")``
    replaces them by those of MPQCO: SGD with momentum 0.9, weight decay 5e-5, cosine to zero over the whole run.
    """

    # The optimizer that quantizers of layers which none trains go with; None: they stay as they are.
    _default_owner: int | None = None

    options: TrainingOptions

    @takes(FineTuneOptions)
    def __init__(self, options: FineTuneOptions) -> None:
        super().__init__()
        self.options = options
        self._estimator = estimator_of(options.estimator)

    @override
    def _begin(self) -> None:
        self._own: QuantizerOptimizer | None = None
        self._users = UserOptimizers(set())
        self._learned: list[nn.Parameter] = []
        self._idle: list[nn.Parameter] = []  # those of them that go with no optimizer
        self._frozen: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = []
        self._untrained = UntrainedWeights()
        self._batchnorm = BatchNormStatistics(None, 0)
        self._distillation = Distillation()
        self._dampening = Dampening(0.0)
        self._watch: DivergenceWatch | None = None
        self._resumed: dict[str, Any] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose what is learned before DDP looks at it."""
        self._distillation.stop()  # what a run that failed has left
        super().setup(trainer, pl_module, stage)
        if not _has_quantize(trainer) and is_attached(pl_module):
            prune_float_weights(trainer, self)
        if stage != "fit":
            return
        build_as_float(pl_module)
        if is_attached(pl_module) or "configure_model" not in vars(pl_module):
            self._choose(pl_module)
            return
        configure = pl_module.configure_model  # Quantize attaches when it has built the layers

        def configure_model() -> None:
            configure()
            self._choose(pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def _choose(self, module: pl.LightningModule) -> None:
        require_attached(module, type(self).__name__)
        check_parametrizations(module)
        set_estimator(module, self._estimator)
        self._frozen = freeze_with_weights(module) if self._default_owner is None else []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Arrange optimizers, schedulers and the float copy; optimizer states are restored after this."""
        self._batchnorm = BatchNormStatistics(self.options.freeze_bn_epoch, self.options.reestimate_bn)
        self._batchnorm.check(pl_module)
        self._users = UserOptimizers(quantizer_parameters(pl_module), self._resumed.get("peaks", []))
        self._learned = [part for q in quantizers(pl_module) for part in learned(q).values()]
        replace_optimizers(trainer, pl_module, self.options, self._users.ours)
        self._users.look(trainer.optimizers)
        replace_schedulers(trainer, self.options, self._targets_met_at)
        self._own = self._own_optimizer(trainer, pl_module)
        if self._own is not None and "optimizers" in self._resumed:
            self._own.load_state_dict(self._resumed["optimizers"])
        if self.options.distill:
            self._distillation.start(trainer, pl_module, self.options, self._resumed.get("teacher"))
        self._watch = DivergenceWatch(list(quantizers(pl_module)))
        self._resumed = {}

    def _own_optimizer(self, trainer: pl.Trainer, module: pl.LightningModule) -> QuantizerOptimizer | None:
        """The optimizer of what is learned of the quantizers."""
        if not self._learned:
            return None
        groups, scales = self._grouped(trainer, module)
        return QuantizerOptimizer(groups, self.options.rate, adam(self.options.rate), scales)

    def _targets_met_at(self) -> int | None:
        """The step at which all widths were at their targets; None: they are not yet."""
        return 0

    def _grouped(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> tuple[list[dict[str, nn.Parameter]], dict[str, float]]:
        """What is learned by the user's optimizers that it goes with, and factors on its learning rate; by name."""
        groups, scales = learned_by_optimizer(module, trainer.optimizers, self._default_owner)
        owners = {id(p) for group in groups for p in group.values()}
        self._idle = [p for p in self._learned if id(p) not in owners]
        return groups, scales

    def _look_at_optimizers(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take our parameters out again, and take up what is trained now, if the user's optimizers have changed."""
        if self._users.look(trainer.optimizers) and self._own is not None:
            self._arrange(trainer, module)

    def _arrange(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Step what is learned with the optimizers that train the weights now."""
        if self._own is not None:
            self._own.arrange(*self._grouped(trainer, module))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the rates to compare with: by now a search for one is over."""
        if not _has_quantize(trainer):  # which does so itself
            self._untrained.expect()
        self._look_at_optimizers(trainer, pl_module)
        self._users.find_peaks()
        self._dampening = Dampening(getattr(self.options, "dampening", 0.0))
        self._dampening.start(pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze BatchNorm statistics from the chosen epoch on."""
        self._batchnorm.freeze(pl_module, trainer.current_epoch)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See what was unfrozen since; in a step, an optimizer may have been given the only trained parameters."""
        self._untrained.look(pl_module, trainer.optimizers)
        unfreeze_with_weights(self._frozen)
        self._look_at_optimizers(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Forget gradients that the user has forgotten."""
        self._look_at_optimizers(trainer, pl_module)
        if self._own is not None:
            forget_stale_gradients(trainer.optimizers, self._own.groups)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Step the quantizer parameters along with the user's optimizer."""
        self._look_at_optimizers(trainer, pl_module)
        self._dampening.add(trainer, optimizer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FreezeOscillations):
                callback.take_gradients(trainer, optimizer)
        if self._own is None:
            return
        for parameter in self._idle:
            parameter.grad = None
        stepped = getattr(optimizer, "optimizer", optimizer)
        index = next((i for i, known in enumerate(trainer.optimizers) if known is stepped), 0)
        self._step_own(trainer, index, self._users.factor(index))

    def _step_own(self, trainer: pl.Trainer, index: int, factor: float) -> None:
        """Step the quantizers of one of the user's optimizers, whose schedule stands at `factor`."""
        if self._own is None:
            return
        self._own.step(index, factor, getattr(trainer.precision_plugin, "scaler", None))
        if "zero_point" in self._estimator.learns:
            hold_zero_points(trainer.lightning_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log losses; look for divergence; measure BatchNorm statistics before the last validation."""
        self._distillation.log(pl_module)
        self._dampening.log(pl_module)
        if self._watch is not None:
            self._watch.see(outputs, trainer.global_step)
        if trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1:
            self._batchnorm.measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure BatchNorm statistics, if training ended before its last epoch did."""
        self._batchnorm.measure(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up what other callbacks may have put in place of the parameters, such as their averages."""
        finish_zero_points(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        super().teardown(trainer, pl_module, stage)
        self._users.release()
        self._distillation.stop()
        self._dampening.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of the quantizers' optimizer and weights of the float copy."""
        state: dict[str, Any] = {}
        if self._own is not None:
            state["optimizers"] = self._own.state_dict()
            state["peaks"] = self._users.peaks
        if self._distillation.teacher is not None:
            state["teacher"] = self._distillation.teacher.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer to give it to."""
        super().load_state_dict(state_dict)
        self._resumed = state_dict


def _has_quantize(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, Quantize) for callback in trainer.callbacks)  # type: ignore[attr-defined]
