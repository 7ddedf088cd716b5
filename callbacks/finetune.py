"""Fine-tune a quantized module: the user's training goes on, quantizer parameters get an optimizer of their own.

The steps of the quantizers are ordinary parameters of the module, but an optimizer that trains weights must not move
them (its decay and learning rate are meant for weights). They are taken out of the user's optimizers before any
optimizer state exists, and stepped by an Adam of their own whenever the user's optimizer steps. Its learning rate
follows the user's schedule in proportion; its state is in the callback's, so that a resumed run continues it.
"""

import math
import warnings
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lq.attach import set_estimator
from lq.batchnorm import batchnorms, reestimate_batchnorm
from lq.callbacks.data import forward_of, reduce_over, training_batches
from lq.distillation import Distiller, float_copy
from lq.errors import NoEffectWarning, PatternError, SpecError, StateError
from lq.quantizer import Estimator
from lq.sites import common_module, quantizers, require_attached

Schedule = Literal["cosine"]


class FineTune(pl.Callback):
    """Train a quantized module with the straight-through estimator or with learned steps (LSQ).

    Without further arguments the user's optimizer and scheduler are kept. ``FineTune(lr=0.005, schedule="cosine")``
    replaces them by those of MPQCO: SGD with momentum 0.9, weight decay 5e-5, cosine to zero over the whole run.

    Args:
        estimator: "lsq" learns the steps, "ste" leaves them as calibrated.
        lr: learning rate of an SGD that replaces the user's optimizer; None keeps the user's.
        momentum: of that SGD.
        weight_decay: of that SGD.
        schedule: "cosine" replaces the user's schedulers by a cosine to zero, step by step; None keeps them.
        quantizer_lr: learning rate of the steps' own Adam, in octaves per update; follows the user's schedule.
        freeze_bn_epoch: first epoch in which BatchNorm statistics no longer change; None: they always do.
        reestimate_bn: training samples to measure BatchNorm statistics on anew when training ends; 0: keep the running
            ones.
        distill: weight of the distillation loss from the float copy; 0: none.
        temperature: of the distillation.
        distill_from: name of the module whose output are the logits; by default the innermost one with all quantized
            layers.
    """

    def __init__(
        self,
        estimator: Estimator = "lsq",
        *,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 5e-5,
        schedule: Schedule | None = None,
        quantizer_lr: float = 1e-3,
        freeze_bn_epoch: int | None = None,
        reestimate_bn: int = 0,
        distill: float = 0.0,
        temperature: float = 1.0,
        distill_from: str | None = None,
    ) -> None:
        super().__init__()
        if estimator not in get_args(Estimator):
            raise SpecError(f"estimator={estimator!r} is unknown; use one of {get_args(Estimator)}")
        if schedule is not None and schedule not in get_args(Schedule):
            raise SpecError(f"schedule={schedule!r} is unknown; use one of {get_args(Schedule)}, or None to keep yours")
        for name, value in {"lr": lr, "quantizer_lr": quantizer_lr, "temperature": temperature}.items():
            if value is not None and value <= 0:
                raise SpecError(f"{name}={value} must be positive")
        self.estimator: Estimator = estimator
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.quantizer_lr = quantizer_lr
        self.freeze_bn_epoch = freeze_bn_epoch
        self.reestimate_bn = reestimate_bn
        self.distill = distill
        self.temperature = temperature
        self.distill_from = distill_from
        self._optimizer: torch.optim.Adam | None = None
        self._distiller: Distiller | None = None
        self._resumed: dict[str, Any] = {}
        self._reestimated_at = -1

    # --- before training --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose what is learned before DDP looks at it."""
        if stage == "fit":
            require_attached(pl_module, "FineTune")
            set_estimator(pl_module, self.estimator)

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
        steps = [q.log2_step for q in quantizers(pl_module)]
        self._take_over(trainer, pl_module, steps)
        learned = [step for step in steps if step.requires_grad]
        self._optimizer = torch.optim.Adam(learned, lr=self.quantizer_lr) if learned else None
        if self._optimizer is not None and "optimizer" in self._resumed:
            self._optimizer.load_state_dict(self._resumed["optimizer"])
        if self.distill:
            self._start_distilling(trainer, pl_module)
        self._resumed = {}

    def _take_over(self, trainer: pl.Trainer, module: pl.LightningModule, steps: list[nn.Parameter]) -> None:
        """Take quantizer parameters from the user's optimizers; replace optimizer and schedulers if asked to."""
        if (self.lr is not None or self.schedule is not None) and not module.automatic_optimization:
            raise StateError(
                "lr= and schedule= replace the optimizer of automatic optimization, but this module steps its own; "
                "leave them out and set both in configure_optimizers"
            )
        ours = {id(step) for step in steps}
        if self.lr is not None:
            weights = [p for p in module.parameters() if p.requires_grad and id(p) not in ours]
            sgd = torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
            trainer.strategy.optimizers = [sgd]
            trainer.strategy.lr_scheduler_configs = []
        for optimizer in trainer.optimizers:
            _remove_parameters(optimizer, ours)
        if self.schedule == "cosine":
            total = float(trainer.estimated_stepping_batches)
            if not 0 < total < math.inf:
                raise SpecError(
                    "schedule='cosine' needs the number of steps; set max_epochs or max_steps on the Trainer"
                )
            trainer.strategy.lr_scheduler_configs = [
                LRSchedulerConfig(_cosine(optimizer, total), interval="step") for optimizer in trainer.optimizers
            ]

    def _start_distilling(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        student = common_module(module)[1]
        if self.distill_from is not None:
            try:
                student = module.get_submodule(self.distill_from)
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
        self._distiller = Distiller(
            student,
            teacher,
            weight=self.distill,
            temperature=self.temperature,
            gradient_scale=lambda: _loss_scale(trainer) / trainer.accumulate_grad_batches,
        )

    # --- training ---------------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze BatchNorm statistics from the chosen epoch on."""
        if self.freeze_bn_epoch is not None and trainer.current_epoch >= self.freeze_bn_epoch:
            for norm in batchnorms(pl_module):
                norm.eval()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Step the quantizer parameters along with the user's optimizer."""
        if self._optimizer is None or all(p.grad is None for p in self._optimizer.param_groups[0]["params"]):
            return
        self._optimizer.param_groups[0]["lr"] = self.quantizer_lr * _schedule_factor(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)  # unscales, and skips the step if a gradient overflowed
        self._optimizer.zero_grad()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the distillation loss; measure BatchNorm statistics before the last validation."""
        if self._distiller is not None:
            if self._distiller.loss is None:
                raise StateError(
                    "distillation saw no output: the training step does not call the module it listens to; "
                    "name one that it calls, and that gives the logits, with distill_from="
                )
            pl_module.log("distill_loss", self._distiller.loss, prog_bar=True)
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
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self._distiller is not None:
            self._distiller.remove()
            self._distiller = None

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of the quantizers' optimizer and weights of the float copy."""
        state: dict[str, Any] = {}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        if self._distiller is not None:
            state["teacher"] = self._distiller.teacher.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer to give it to."""
        self._resumed = state_dict


def _cosine(optimizer: Optimizer, total: float) -> LambdaLR:
    """A cosine to zero over `total` steps, from the learning rate the optimizer was meant to have at its peak."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.pop("max_lr", group.get("initial_lr", group["lr"]))
        for key in ("min_lr", "max_momentum", "base_momentum"):  # left by a cyclic schedule that is replaced
            group.pop(key, None)
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0))))


def _remove_parameters(optimizer: Optimizer, ids: set[int]) -> None:
    """Take parameters out of an optimizer that has not stepped yet."""
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in ids]
        if len(kept) < len(group["params"]) and hasattr(optimizer, "_params"):
            raise StateError(
                f"{type(optimizer).__name__} keeps its own list of parameters, so that quantizer parameters cannot be "
                "taken out; give it only the weights, or use FineTune(estimator='ste')"
            )
        group["params"] = kept


def _schedule_factor(trainer: pl.Trainer) -> float:
    """Where the user's schedule stands: current over initial learning rate; 1 without a schedule."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            initial = group.get("max_lr", group.get("initial_lr"))  # cyclic schedules start far below their peak
            if initial:
                return float(group["lr"]) / float(initial)
    return 1.0


def _loss_scale(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
