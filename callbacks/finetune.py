"""Fine-tune a quantized module: the user's training goes on, quantizer parameters get an optimizer of their own.

What an estimator learns of the quantizers (`lq.quantizer.estimators`) are ordinary parameters of the module, but an
optimizer that trains weights must not move them (its decay and learning rate are meant for weights). They are taken
out of the user's optimizers, then and whenever groups are added or optimizers replaced, and stepped by an Adam of
their own whenever the user's optimizer of their layer steps: what is learned of a layer that is unfrozen later is
trained from then on. Its learning rate follows the user's schedule in proportion; its state is in the callback's, so
that a resumed run continues it.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lq.attachment.attach import set_estimator
from lq.attachment.float_models import float_copy
from lq.attachment.sites import common_module, is_attached, quantizers, require_attached
from lq.calibration.batchnorm import batchnorms, reestimate_batchnorm
from lq.callbacks.quantize import Quantize
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.callbacks.trainer.divergence import DivergenceWatch
from lq.callbacks.trainer.optimizers import (
    QuantizerOptimizer,
    UserOptimizers,
    adam,
    forget_stale_gradients,
    freeze_with_weights,
    learned,
    loss_scale,
    owned,
    quantizer_parameters,
    steps_of,
    unfreeze_with_weights,
)
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.pruning import check_parametrizations, prune_float_weights
from lq.callbacks.trainer.schedules import Schedule, cosine, noise_scale, scheduler
from lq.callbacks.trainer.untrained import build_as_float, warn_of_untrained
from lq.errors import NoEffectWarning, PatternError, SpecError, StateError
from lq.quantizer.estimators import Estimator
from lq.quantizer.estimators import estimator as estimator_of
from lq.training.distillation import Distiller, Loss


class FineTune(ModuleCallback):
    """Train a quantized module with the straight-through estimator or with learned steps (LSQ and others).

    Without further arguments the user's optimizer and scheduler are kept. ``FineTune(lr=0.005, schedule="cosine")``
    replaces them by those of MPQCO: SGD with momentum 0.9, weight decay 5e-5, cosine to zero over the whole run.

    Args:
        estimator: what is learned of the quantizers and how, by name: "lsq" learns the steps, "lsq_plus" the zero
            points of activations too, "ewgs" and "adaptive_ewgs" weigh gradients by rounding errors, "noise_scale" adds
            noise to the steps' gradients, "ste" leaves quantizers as calibrated; or an
            `lq.quantizer.estimators.Estimator`.
        lr: learning rate of an optimizer that replaces the user's; None keeps the user's.
        momentum: of that optimizer, an SGD.
        weight_decay: of that SGD.
        schedule: "cosine" to zero or "noise_scale" (see `lq.callbacks.trainer.schedules`) replaces the user's
            schedulers, step by step; None keeps them.
        warmup: first steps of that schedule, over which the learning rate rises to it.
        quantizer_lr: learning rate of the quantizers' own Adam, in octaves of a step (for zero points: in ranges) per
            update; follows the schedule.
        freeze_bn_epoch: first epoch in which BatchNorm statistics no longer change; None: they always do.
        reestimate_bn: training samples to measure BatchNorm statistics on anew when training ends; 0: keep the running
            ones.
        distill: weight of the distillation loss from the float copy; 0: none.
        distill_loss: "kl", "symmetric_kl", or "features" (see `lq.training.distillation`).
        task: factor on the gradient of your own loss while distilling; 0: the float copy is the only teacher.
        temperature: of the distillation.
        distill_from: name of the module whose output are the logits; by default the innermost one with all quantized
            layers. For features, names of the modules in it whose outputs are compared.
    """

    # The optimizer that quantizers of layers which none trains go with; None: they stay as they are.
    _default_owner: int | None = None

    def __init__(
        self,
        estimator: str | Estimator = "lsq",
        *,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
        schedule: Schedule | None = None,
        warmup: int = 0,
        quantizer_lr: float = 1e-3,
        freeze_bn_epoch: int | None = None,
        reestimate_bn: int = 0,
        distill: float = 0.0,
        distill_loss: Loss = "kl",
        task: float = 1.0,
        temperature: float = 1.0,
        distill_from: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("schedule", schedule, (*get_args(Schedule), None))
        _check_choice("distill_loss", distill_loss, get_args(Loss))
        for name, value in {"lr": lr, "quantizer_lr": quantizer_lr, "temperature": temperature}.items():
            if value is not None and value <= 0:
                raise SpecError(f"{name}={value} must be positive")
        if warmup < 0 or (warmup and schedule is None):
            raise SpecError(f"warmup={warmup} belongs to schedule='cosine' or 'noise_scale', and is not negative")
        self._estimator = estimator_of(estimator)
        self.estimator = estimator
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup = warmup
        self.quantizer_lr: float | None = quantizer_lr
        self._rate = quantizer_lr
        self.freeze_bn_epoch = freeze_bn_epoch
        self.reestimate_bn = reestimate_bn
        self.distill = distill
        self.distill_loss: Loss = distill_loss
        self.task = task
        self.temperature = temperature
        self.distill_from = distill_from

    @override
    def _begin(self) -> None:
        self._own: QuantizerOptimizer | None = None
        self._looked = True  # at the optimizers, for weights that none holds
        self._users = UserOptimizers(set())
        self._learned: list[nn.Parameter] = []
        self._idle: list[nn.Parameter] = []  # those of them that go with no optimizer
        self._frozen: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = []
        self._distiller: Distiller | None = None
        self._teacher: nn.Module | None = None
        self._watch: DivergenceWatch | None = None
        self._resumed: dict[str, Any] = {}
        self._reestimated_at = -1
        self._met_at: int | None = 0  # step at which all widths were at their targets

    # --- before training --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose what is learned before DDP looks at it."""
        self._stop_distilling()  # what a run that failed has left
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
        if (self.freeze_bn_epoch is not None or self.reestimate_bn) and not batchnorms(pl_module):
            warnings.warn(
                "freeze_bn_epoch and reestimate_bn have nothing to do: the module has no BatchNorm "
                "(use Quantize(fold_bn=False) to keep them)",
                NoEffectWarning,
                stacklevel=2,
            )
        self._users = UserOptimizers(quantizer_parameters(pl_module), self._resumed.get("peaks", []))
        self._learned = [part for q in quantizers(pl_module) for part in learned(q).values()]
        self._take_over(trainer, pl_module)
        self._own = self._own_optimizer(trainer, pl_module)
        if self._own is not None and "optimizers" in self._resumed:
            self._own.load_state_dict(self._resumed["optimizers"])
        if self.distill:
            self._start_distilling(trainer, pl_module)
        self._watch = DivergenceWatch(list(quantizers(pl_module)))
        self._resumed, self._reestimated_at = {}, -1

    def _own_optimizer(self, trainer: pl.Trainer, module: pl.LightningModule) -> QuantizerOptimizer | None:
        """The optimizer of what is learned of the quantizers."""
        if not self._learned:
            return None
        groups, scales = self._grouped(trainer, module)
        return QuantizerOptimizer(groups, self._rate, adam(self._rate), scales)

    def _grouped(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> tuple[list[dict[str, nn.Parameter]], dict[str, float]]:
        """What is learned by the user's optimizers that it goes with, and factors on its learning rate; by name."""
        groups, scales = [], {}
        for members in owned(module, trainer.optimizers, self._default_owner):
            groups.append({f"{name}.{part}": p for name, q in members.items() for part, p in learned(q).items()})
            # One learning rate is one share of the range: a zero point is in steps, of which many bits have many.
            scales.update({f"{name}.zero_point": 2.0 ** float(q.bits.detach().max()) for name, q in members.items()})
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

    def _take_over(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take quantizer parameters from the user's optimizers; replace optimizer and schedulers if asked to."""
        if (self.lr is not None or self.schedule is not None) and not module.automatic_optimization:
            raise StateError(
                "lr= and schedule= replace the optimizer of automatic optimization, but this module steps its own; "
                "leave them out and set both in configure_optimizers"
            )
        if self.lr is not None:
            weights = [p for p in module.parameters() if p.requires_grad and id(p) not in self._users.ours]
            trainer.strategy.optimizers = [self._replacement(weights, self.lr)]
            trainer.strategy.lr_scheduler_configs = []
        self._users.look(trainer.optimizers)
        if self.schedule is not None:
            if self.schedule == "cosine" and trainer.max_epochs == -1 and trainer.max_steps == -1:
                raise SpecError(
                    "schedule='cosine' needs the number of steps; set max_epochs or max_steps on the Trainer"
                )
            trainer.strategy.lr_scheduler_configs = [
                LRSchedulerConfig(scheduler(optimizer, self._factor(trainer), self.warmup), interval="step")
                for optimizer in trainer.optimizers
            ]

    def _replacement(self, weights: list[nn.Parameter], lr: float) -> Optimizer:
        """The optimizer that `lr` asks for."""
        return torch.optim.SGD(weights, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def _factor(self, trainer: pl.Trainer) -> Callable[[int], float]:
        """The schedule, as a factor on the learning rate at a step."""
        if self.schedule == "cosine":
            return lambda step: cosine(step, steps_of(trainer)) if step else 1.0
        return lambda step: noise_scale(step, steps_of(trainer), self._met_at) if step else 1.0

    def _start_distilling(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        student = common_module(module)[1]
        features = None
        if self.distill_from is not None and self.distill_loss == "features":
            features = [self.distill_from] if isinstance(self.distill_from, str) else list(self.distill_from)
            student = module
        elif self.distill_from is not None:
            try:
                student = module.get_submodule(str(self.distill_from))
            except AttributeError as error:
                raise PatternError(
                    f"distill_from={self.distill_from!r} is no module of {type(module).__name__}; "
                    f"it has {', '.join(name for name, _ in module.named_children())}"
                ) from error
        attached, module._trainer = module._trainer, None  # a copy of the module must not copy the Trainer
        try:
            teacher = float_copy(student)
        finally:
            module._trainer = attached
        if "teacher" in self._resumed:
            teacher.load_state_dict(self._resumed["teacher"])
        self._teacher = teacher
        self._distiller = Distiller(
            student,
            teacher,
            weight=self.distill,
            loss=self.distill_loss,
            task=self.task,
            temperature=self.temperature,
            features=features,
            gradient_scale=lambda: loss_scale(trainer) / trainer.accumulate_grad_batches,
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the rates to compare with: by now a search for one is over."""
        self._looked = False
        self._look_at_optimizers(trainer, pl_module)
        self._users.find_peaks()

    # --- training ---------------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze BatchNorm statistics from the chosen epoch on."""
        if self.freeze_bn_epoch is not None and trainer.current_epoch >= self.freeze_bn_epoch:
            for norm in batchnorms(pl_module):
                norm.eval()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See what was unfrozen since; in a step, an optimizer may have been given the only trained parameters."""
        if not self._looked:
            self._looked = True
            if not _has_quantize(trainer):  # which does so itself
                warn_of_untrained(pl_module, trainer.optimizers)
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
        if "zero_point" not in self._estimator.learns:
            return
        with torch.no_grad():
            for quantizer in quantizers(trainer.lightning_module):
                if quantizer.learns_offset:  # zero stays a level, and the zero point one that is learned
                    highest = torch.exp2(quantizer.bits) - 1
                    quantizer.zero_point.copy_(torch.minimum(quantizer.zero_point.clamp(min=0.51), highest))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the distillation loss; look for divergence; measure BatchNorm statistics before the last validation."""
        if self._distiller is not None:
            if self._distiller.loss is None:
                raise StateError(
                    "distillation saw no output: the training step does not call the module it listens to; "
                    "name one that it calls, and that gives the logits, with distill_from="
                )
            pl_module.log("distill_loss", self._distiller.loss, prog_bar=True)
        if self._watch is not None:
            self._watch.see(outputs, trainer.global_step)
        if trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1:
            self._reestimate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure BatchNorm statistics, if training ended before its last epoch did."""
        self._reestimate(trainer, pl_module)

    def _reestimate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.reestimate_bn or self._reestimated_at == trainer.global_step or not batchnorms(module):
            return
        reestimate_batchnorm(
            module,
            training_batches(trainer, self.reestimate_bn, "Measuring BatchNorm"),
            forward=forward_of(trainer, module, None),
            reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
            ranks=trainer.world_size,
        )
        self._reestimated_at = trainer.global_step

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up what other callbacks may have put in place of the parameters, such as their averages."""
        for quantizer in quantizers(pl_module):
            if quantizer.learns_offset:
                with torch.no_grad():
                    quantizer.zero_point.round_()  # as it is used
            quantizer.refresh()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        super().teardown(trainer, pl_module, stage)
        self._users.release()
        self._stop_distilling()

    def _stop_distilling(self) -> None:
        if self._distiller is not None:
            self._distiller.remove()
            self._distiller = None

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of the quantizers' optimizer and weights of the float copy."""
        state: dict[str, Any] = {}
        if self._own is not None:
            state["optimizers"] = self._own.state_dict()
            state["peaks"] = self._users.peaks
        if self._teacher is not None:
            state["teacher"] = self._teacher.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer to give it to."""
        super().load_state_dict(state_dict)
        self._resumed = state_dict


def _has_quantize(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, Quantize) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={value!r} is unknown; use one of {tuple(choices)}")
