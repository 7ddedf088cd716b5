"""Distillation in a Trainer: a float copy of the module teaches it, and goes along in checkpoints.

The loss and how its gradient is added is `lq.training.distillation`'s.
"""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lq.attachment.float_models import float_copy
from lq.attachment.sites import common_module
from lq.callbacks.trainer.optimizers import loss_scale
from lq.callbacks.trainer.training_options import TrainingOptions
from lq.errors import PatternError, StateError
from lq.training.distillation import Distiller


class Distillation:
    """The float copy that teaches a module, and the hooks that compare the two."""

    def __init__(self) -> None:
        self.distiller: Distiller | None = None
        self.teacher: nn.Module | None = None  # stays when the training is over, for a checkpoint after it

    @property
    def loss(self) -> Tensor | None:
        """The loss of the last forward, without its graph; None before there is one."""
        return None if self.distiller is None else self.distiller.loss

    def start(
        self, trainer: pl.Trainer, module: pl.LightningModule, options: TrainingOptions, state: dict[str, Any] | None
    ) -> None:
        """Copy the module and put hooks on it.

        Args:
            trainer: the Trainer of the module.
            module: a quantized module.
            options: weight, loss, temperature, and where the logits are.
            state: weights of the teacher, of a run that is resumed; None: the module's float weights.
        """
        student, features = _student(module, options)
        teacher = copy_without_trainer(module, student)
        if state is not None:
            teacher.load_state_dict(state)
        self.teacher = teacher
        self.distiller = Distiller(
            student,
            teacher,
            weight=options.distill,
            loss=options.distill_loss,
            task=options.task,
            temperature=options.temperature,
            features=features,
            gradient_scale=lambda: loss_scale(trainer) / trainer.accumulate_grad_batches,
        )

    def log(self, module: pl.LightningModule) -> None:
        """Log the loss of this step as ``distill_loss``.

        Raises:
            StateError: if the training step did not run the module that is compared.
        """
        if self.distiller is None:
            return
        if self.distiller.loss is None:
            raise StateError(
                "distillation saw no output: the training step does not call the module it listens to; "
                "name one that it calls, and that gives the logits, with distill_from="
            )
        module.log("distill_loss", self.distiller.loss, prog_bar=True)

    def stop(self) -> None:
        """Leave no hook behind."""
        if self.distiller is not None:
            self.distiller.remove()
            self.distiller = None


def _student(module: pl.LightningModule, options: TrainingOptions) -> tuple[nn.Module, list[str] | None]:
    """The module whose outputs are compared, or those of whose parts of these names are."""
    name = options.distill_from
    if name is None:
        return common_module(module)[1], None
    if options.distill_loss == "features":
        return module, [name] if isinstance(name, str) else list(name)
    try:
        return module.get_submodule(str(name)), None
    except AttributeError as error:
        raise PatternError(
            f"distill_from={name!r} is no module of {type(module).__name__}; "
            f"it has {', '.join(name for name, _ in module.named_children())}"
        ) from error


def copy_without_trainer(module: pl.LightningModule, part: nn.Module) -> nn.Module:
    """A float copy of a part of a module; of the module itself, without its Trainer."""
    attached, module._trainer = module._trainer, None
    try:
        return float_copy(part)
    finally:
        module._trainer = attached
