"""Freeze weights that oscillate between two levels while training, and count them.

What an oscillation is, and what freezing does, is in `lq.training.oscillations`. Weights are looked at after each step
of the user's optimizer that holds them, by a hook on it: batches that are accumulated do not count, nor do steps that a
loss scaler skips. All of it is elementwise work on weights, the same on every rank, and no device is waited for.

Cost, beside LSQ's training step of ResNet-20 (W4A4, 128 images, one CPU thread; ``python
examples/benchmarks/training_step.py --models resnet20 --estimators lsq "lsq, counted" "lsq, half frozen"``): 1.4 ms to
count, 6.6 ms with half of the weights frozen, of a step of 0.6 s; no difference between whole steps was seen.
"""

import warnings
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lq.attachment.sites import require_attached
from lq.callbacks.trainer.optimizers import scales_before_step, share_of_run
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.schedules import cosine
from lq.errors import NoEffectWarning
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.training.oscillations import OscillationTracker, check_thresholds, check_tracking, shares
from lq.training.quantized_weights import quantized_weights

State = dict[str, dict[str, Tensor]]


class FreezeOscillations(ModuleCallback):
    """Freeze weights that oscillate often, each at its mean integer, for the rest of the training.

    It goes with every estimator, behind `Quantize` (and any `FineTune`) in the list; steps that are learned are learned
    on, and frozen weights follow them. Shares of weights that oscillate and that are frozen are logged while training,
    as ``oscillating_weights`` and ``frozen_weights``. A frequency of 1 is never exceeded: ``start=1.0, end=1.0`` counts
    alone.

    Args:
        start: frequency of oscillations, per step, above which a weight is frozen when training begins.
        end: that frequency when training ends; a cosine leads from one to the other.
        momentum: weight of one step in the running means of oscillations and of integers.
        max_bits: weights of more bits are left alone, and not counted.

    Example::

        callbacks = [Quantize(3, 3), FineTune("lsq"), FreezeOscillations()]
    """

    def __init__(self, start: float = 0.1, end: float = 0.01, momentum: float = 0.01, max_bits: int = 4) -> None:
        super().__init__()
        check_thresholds(start, end)
        check_tracking(momentum, max_bits)
        self.start = start
        self.end = end
        self.momentum = momentum
        self.max_bits = max_bits
        self._hooks: list[Any] = []

    @override
    def _begin(self) -> None:
        self._aside: State = {}  # of weights that no tracker has now, by name
        self._trackers: list[OscillationTracker] = []  # one for each optimizer
        self._quantizers: list[WeightQuantizer] = []  # of all weights that are trained
        self._arranged_by: tuple[Any, ...] = ()
        self._versions: dict[str, int] = {}  # of widths, by name
        self._threshold = 1.0
        self._shares: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
        self._looked = False  # whether optimizers have stepped in this batch
        self._hooked = False  # whether a hook has said so
        self._steps = 0  # that the Trainer knows of

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Turn to the module; take off hooks that a run which failed has left."""
        self._release()
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to look, or go on: frozen weights are on their levels."""
        require_attached(pl_module, "FreezeOscillations")
        self._arrange(trainer, pl_module)
        self._steps = trainer.global_step
        if any(tracker.count for tracker in self._trackers):
            return
        found = quantized_weights(pl_module)
        if not any(weight.quantizer.final_bits is not None for weight in found):  # widths that are still to come down
            warnings.warn(
                f"FreezeOscillations found no weight of at most {self.max_bits} bits among the {len(found)} "
                "quantized ones, or no optimizer trains it: it does nothing; raise max_bits=, or leave it out",
                NoEffectWarning,
                stacklevel=2,
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take up weights that are trained since, and widths that have changed; find the threshold of this step."""
        if self._arrangement(trainer) != self._arranged_by:
            self._arrange(trainer, pl_module)
        if self.start == self.end:
            self._threshold = self.start
        else:
            done = share_of_run(trainer, f"FreezeOscillations(start={self.start}, end={self.end})")
            self._threshold = self.end + (self.start - self.end) * cosine(done, 1.0)
        self._looked = False

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients of frozen weights."""
        self.take_gradients(trainer, optimizer)

    def take_gradients(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Give the gradients of frozen weights to their steps; `FineTune` asks for it before it steps these."""
        stepped = getattr(optimizer, "optimizer", optimizer)
        of_weights, of_steps = scales_before_step(trainer, stepped)
        for known, tracker in zip(trainer.optimizers, self._trackers, strict=False):
            if known is stepped:
                tracker.take_gradients(of_steps / of_weights)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the shares; look now if the optimizers have stepped without a word, as wrappers around others do."""
        if trainer.global_step > self._steps and not self._hooked:
            for index in range(len(self._trackers)):
                self._look(index)
        self._steps = trainer.global_step
        if self._looked:
            self._shares = shares(self._trackers)
        if any(tracker.count for tracker in self._trackers):
            for name, share in zip(("oscillating_weights", "frozen_weights"), self._shares, strict=True):
                pl_module.log(name, share)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the shares that training ends with."""
        if any(tracker.count for tracker in self._trackers):
            oscillating, frozen = (float(share) for share in shares(self._trackers))
            self.numbers |= {"oscillations/oscillating": oscillating, "oscillations/frozen": frozen}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind, and hold no weight."""
        super().teardown(trainer, pl_module, stage)
        self._release()
        self._set_aside()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What is known of each weight."""
        state = self._state()
        return {"weights": state} if state else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        super().load_state_dict(state_dict)
        self._aside, self._versions = state_dict["weights"], {}

    def _arrangement(self, trainer: pl.Trainer) -> tuple[Any, ...]:
        """What trackers depend on, on the host: what optimizers train, and widths."""
        trained = [
            (id(optimizer), *(id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad))
            for optimizer in trainer.optimizers
        ]
        return tuple(trained), tuple((q.final_bits is None, q.width_changes) for q in self._quantizers)

    def _arrange(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Have a tracker for each optimizer, with the weights that it trains; widths that changed begin anew."""
        self._set_aside()
        found = quantized_weights(module)
        self._quantizers = [weight.quantizer for weight in found]
        versions = {weight.name: weight.quantizer.width_changes for weight in found}
        for name, version in versions.items():
            if self._versions.get(name, version) != version:
                self._aside.pop(name, None)
        self._versions = versions
        self._release()
        taken: set[str] = set()
        for index, optimizer in enumerate(trainer.optimizers):
            held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
            mine = [weight for weight in found if id(weight.parameter) in held and weight.name not in taken]
            taken |= {weight.name for weight in mine}
            self._trackers.append(OscillationTracker(mine, self.momentum, self.max_bits, self._aside))
            with suppress(AttributeError):  # wrappers around optimizers may lack what hooks need
                hook = optimizer.register_step_post_hook(partial(self._stepped, index))
                self._hooks.append(hook)
        for tracker in self._trackers:
            tracker.hold()
        self._shares = shares(self._trackers)
        self._arranged_by = self._arrangement(trainer)

    def _stepped(self, index: int, *_: Any) -> None:
        self._hooked = True
        self._look(index)

    def _look(self, index: int) -> None:
        """Look at the weights of an optimizer that has stepped."""
        self._trackers[index].step(self._threshold)
        self._looked = True

    def _state(self) -> State:
        return {**self._aside, **{name: part for t in self._trackers for name, part in t.state().items()}}

    def _set_aside(self) -> None:
        """Keep what is known, but no weight."""
        self._aside = self._state()
        self._trackers, self._quantizers, self._arranged_by = [], [], ()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
