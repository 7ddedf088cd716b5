"""Learn the noise scale of every tensor or channel along with the network, and with it the widths.

The callback is `FineTune` with one thing more: beside steps, ranges are learned, so that widths are real numbers
(`lq.training.noise_scale`). A penalty and a falling ceiling bring them to their targets, or their total to a budget;
then they become integers, for good, and training goes on with the steps alone. Checkpoints and validations after that
are of the model that will be exported; those before it have widths between integers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lq.allocation.budget import Costs, parse_budget
from lq.attachment.sites import quantizers
from lq.attachment.summary import WIDTH_BITS, summary
from lq.calibration.refitting import fit_ranges
from lq.callbacks.finetune import FineTune
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.final_widths import ChangesWidths
from lq.callbacks.trainer.optimizers import QuantizerOptimizer, adam, loss_scale, owned, steps_of
from lq.callbacks.trainer.schedules import Schedule
from lq.errors import BudgetError, SpecError
from lq.quantizer.estimators import NoiseScale
from lq.quantizer.final_widths import set_final_widths
from lq.training.distillation import Loss
from lq.training.noise_scale import HEAD, Penalty, SizeBudget, Targets, WidthLearner, prune_silent, target_widths

# Learning rate of steps and ranges, in octaves per update: GDNSQ's, or what takes them so many octaves in the run.
_RATE, _TRAVEL, _FASTEST = 2e-3, 6.0, 3e-2
# Steps after which widths are integers in a run that has no end.
_ENDLESS = 1000


class LearnNoiseScale(ChangesWidths, FineTune):
    """Train a quantized module with learned noise scales: widths come down to targets, or share a budget.

    Widths start where `Quantize` (or `AllocateBits`) has put them: 8 bits, say. Channels that come to less than half a
    bit, or that are all zeros in the end, are pruned. The user's optimizer is kept unless `lr` is given, which replaces
    it by RAdam.

    Args:
        weights: width that weights come down to, in bits; not used with a budget. None: they keep theirs.
        activations: width that activations come down to; None: they keep theirs.
        budget: mean weight bits (``3.0``), compression (``"8x"``) or stored bytes (``"1.5MB"``) of all weights
            together, instead of one width for all: how it is shared is learned.
        first_last: least width of the first and last layers, as in `Quantize`; with a budget they take part in it.
        pins: widths of single layers or sites, by name pattern: ``{"model.fc": 8}``.
        until: share of the run after which all widths are integers, if they have not met their targets before; what is
            left trains the steps alone.
        lr: learning rate of a RAdam that replaces the user's optimizer; None keeps the user's.
        schedule: "noise_scale" holds the learning rate until the targets are met, then lets it fall exponentially;
            "cosine" to zero; None keeps the user's.
        warmup: first steps of that schedule, over which the learning rate rises; the penalty waits as long.
        quantizer_lr: learning rate of steps and ranges, in octaves per update; None: 2e-3 in long runs, more in short
            ones (6 octaves over the run, 0.03 at most).
        freeze_bn_epoch: first epoch in which BatchNorm statistics no longer change; None: they always do.
        reestimate_bn: training samples to measure BatchNorm statistics on anew when training ends.
        distill: weight of the distillation loss from the float copy; 0: none.
        distill_loss: "symmetric_kl", "kl" or "features".
        task: factor on the gradient of your own loss while distilling; 0, as in GDNSQ: the float copy is the only
            teacher.
        temperature: of the distillation.
        distill_from: as in `FineTune`.

    Example::

        Trainer(max_epochs=30, callbacks=[Quantize(8, 8, fold_bn=False), LearnNoiseScale(weights=2, activations=2)])
    """

    _default_owner = 0

    def __init__(
        self,
        weights: int | None = 4,
        activations: int | None = 4,
        budget: float | str | None = None,
        *,
        first_last: int | None = 8,
        pins: Mapping[str, int] | None = None,
        until: float = 0.1,
        lr: float | None = None,
        schedule: Schedule | None = None,
        warmup: int = 0,
        quantizer_lr: float | None = None,
        freeze_bn_epoch: int | None = None,
        reestimate_bn: int = 0,
        distill: float = 1.0,
        distill_loss: Loss = "symmetric_kl",
        task: float = 1.0,
        temperature: float = 1.0,
        distill_from: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            NoiseScale(widths=True),
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            quantizer_lr=1e-3 if quantizer_lr is None else quantizer_lr,
            freeze_bn_epoch=freeze_bn_epoch,
            reestimate_bn=reestimate_bn,
            distill=distill,
            distill_loss=distill_loss,
            task=task,
            temperature=temperature,
            distill_from=distill_from,
        )
        target_widths(nn.Identity(), weights, activations, first_last=first_last)  # wrong widths fail here
        if not 0 < until <= 1:
            raise SpecError(f"until={until} is no share of a run; give a number above 0, at most 1")
        if budget is not None and parse_budget(budget).kind not in ("bits", "compression", "bytes"):
            raise SpecError(f"budget={budget!r}: widths are learned within mean bits, a compression or bytes")
        self.weights = weights
        self.activations = activations
        self.budget = budget
        self.first_last = first_last
        self.pins = pins
        self.until = until
        self.quantizer_lr = quantizer_lr

    @override
    def _begin(self) -> None:
        super()._begin()
        self._learners: list[WidthLearner] = []
        self._owners: list[int] = []  # which of the user's optimizers each belongs to
        self._aim: Targets | SizeBudget = Targets(torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(0))
        self._values = torch.zeros(0)  # how many values share each step
        self._shares: dict[str, Tensor] = {}  # of each step in what is reported
        self._penalty = Penalty(0.0)
        self._deadline = 0
        self._progress = 0.0
        self._loss: Tensor | None = None
        self._met_at = None
        self._settled_at: int | None = None

    def widths(self) -> dict[str, float]:
        """The width ``I_alpha`` of each tensor now, in bits, the mean over its channels; by name."""
        found = {}
        for learner in self._learners:
            parts = learner.bits.split(learner.sizes)
            found.update({q.name: float(bits.mean()) for q, bits in zip(learner.members, parts, strict=True)})
        return found

    # --- before training --------------------------------------------------------------------------------------------

    @override
    def _choose(self, module: pl.LightningModule) -> None:
        self._estimator = NoiseScale(widths=True)
        super()._choose(module)

    @override
    def _own_optimizer(self, trainer: pl.Trainer, module: pl.LightningModule) -> QuantizerOptimizer:
        weights = self.weights if self.budget is None else None
        targets: dict[str, float] = target_widths(
            module, weights, self.activations, first_last=self.first_last, pins=self.pins
        )
        if "noise_scale" not in self._resumed:
            fit_ranges(module, {**self._mean_widths(module), **targets}, HEAD)
        learned = self._sharing(module)
        kept = {q.name: q.bits.detach().clone() for q in quantizers(module) if q.name not in {*targets, *learned}}
        groups = [list(group.values()) for group in owned(module, trainer.optimizers, self._default_owner)]
        self._learners = [WidthLearner(group, {**targets, **kept}) for group in groups if group]
        self._owners = [index for index, group in enumerate(groups) if group]
        self._met_at, self._settled_at, self._progress, self._deadline = None, None, 0.0, 0
        saved = self._resumed.get("noise_scale")
        start = self._all("start")
        if saved is not None:
            start = saved["start"].to(start.device)
            self._met_at, self._settled_at = saved["met_at"], saved["settled_at"]
            self._progress = saved["progress"]
            for learner, parts in zip(self._learners, saved["parts"], strict=True):
                learner.load(parts)
        self._aim = self._aim_at(module, start)
        rate = _RATE if self.quantizer_lr is None else self.quantizer_lr
        self._penalty = Penalty(2 * rate, self.warmup)
        if saved is not None:
            self._penalty.steps, self._penalty.loss = saved["penalty"]
        if self._settled_at is not None:
            self._use_integers(module)
        set_final_widths(module, self._final_widths())
        if saved is None:
            give_to_averages(trainer, module)
        return self._adam(rate)

    def _adam(self, rate: float) -> QuantizerOptimizer:
        groups = [
            {f"{number}.{name}": parameter for name, parameter in learner.parameters.items()}
            for number, learner in enumerate(self._learners)
        ]
        return QuantizerOptimizer(groups, rate, adam(rate))

    @override
    def _arrange(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Widths come down together, whatever is frozen: all quantizers stay with the optimizer they began with."""

    @override
    def _final(self) -> bool:
        return self._settled_at is not None or not self._learners

    def _final_widths(self) -> dict[str, Tensor]:
        """Widths at the end of training by name; with a budget, the mean that it allows."""
        if self._final():
            return {}
        now = self._all("bits")
        final = torch.where(self._all("target").isnan(), now, self._all("target"))
        if isinstance(self._aim, SizeBudget):
            costs = self._aim.costs
            final = torch.where(costs > 0, min(self._aim.limit / float(costs.sum()), float(now.max())), final)
        parts = final.split([len(one.bits) for one in self._learners])
        return {
            quantizer.name: bits.view(quantizer.bits.shape)
            for learner, part in zip(self._learners, parts, strict=True)
            for quantizer, bits in zip(learner.members, part.split(learner.sizes), strict=True)
        }

    def _sharing(self, module: nn.Module) -> set[str]:
        """Names of the quantizers whose widths share the budget: those of weights that are stored in integers."""
        if self.budget is None:
            return set()
        return {t.name for t in Costs.of(module).tensors.values() if t.role == "weight" and t.numel}

    def _mean_widths(self, module: nn.Module) -> dict[str, float]:
        """The mean width of a budget for all weights, unless their widths have been chosen already."""
        if self.budget is None:
            return {}
        budget, costs = parse_budget(self.budget), Costs.of(module)
        weights = [t for t in costs.tensors.values() if t.role == "weight" and t.numel]
        values = max(sum(t.numel for t in weights), 1)
        mean = math.ceil(budget.limit * 8 / values if budget.kind == "bytes" else budget.cost_limit)
        chosen = len({t.bits for t in weights}) > 1
        return {} if chosen else {t.name: float(min(max(mean, 1), 8)) for t in weights}

    def _plan(self, trainer: pl.Trainer) -> None:
        """Spread the way of the widths over the length of the run."""
        total = steps_of(trainer)
        self._deadline = max(int(self.until * total), 1) if math.isfinite(total) else _ENDLESS
        if self.quantizer_lr is None and self._own is not None:
            self._own.lr = max(_RATE, min(_TRAVEL / total, _FASTEST))
            self._penalty.growth = 2 * self._own.lr

    def _aim_at(self, module: pl.LightningModule, start: Tensor) -> Targets | SizeBudget:
        """What widths are brought to."""
        is_weight = self._all("is_weight")
        targets = Targets(self._all("target"), is_weight, start)
        costs = Costs.of(module)
        counts = []
        for learner in self._learners:
            for quantizer, size in zip(learner.members, learner.sizes, strict=True):
                counts += [costs.tensors[quantizer.name].numel / size] * size
        self._values = torch.tensor(counts, dtype=torch.float32, device=start.device)
        kinds = {"weight_bits": self._values * is_weight, "activation_bits": (~is_weight).float()}
        self._shares = {name: counted / counted.sum() for name, counted in kinds.items() if bool(counted.any())}
        if self.budget is None:
            return targets
        budget = parse_budget(self.budget)
        stored = self._values * is_weight
        if not bool(stored.any()):
            raise BudgetError(f"budget={self.budget!r}, but no weight has a width; quantize weights, or give targets")
        if budget.kind != "bytes":
            return SizeBudget(stored / stored.sum(), budget.cost_limit, targets, start)
        channels = int((stored > 0).sum())
        layers = sum(costs.tensors[q.name].numel > 0 for learner in self._learners for q in learner.members)
        left = budget.limit - costs.overhead - layers - channels * WIDTH_BITS / 8  # whole bytes; each channel's width
        if left <= 0:
            raise BudgetError(
                f"budget={self.budget!r} cannot be met: {budget.limit - left:.0f} bytes are taken by what is not codes "
                "of weights; give more"
            )
        return SizeBudget(stored / 8, left, targets, start)

    @override
    def _replacement(self, weights: list[nn.Parameter], lr: float) -> Optimizer:
        return torch.optim.RAdam(weights, lr=lr)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the loss rise without a word as long as widths come down."""
        super().on_train_start(trainer, pl_module)
        if self._watch is not None:
            self._watch.expects_rise = self._settled_at is None

    # --- training ---------------------------------------------------------------------------------------------------

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss that the penalty is measured by."""
        super().on_before_backward(trainer, pl_module, loss)
        self._loss = loss.detach() * trainer.accumulate_grad_batches
        if self._distiller is not None and self._distiller.loss is not None:
            self._loss = self._distiller.loss
        if trainer.world_size > 1 and self._settled_at is None:  # widths have to stay the same on all ranks
            self._loss = trainer.strategy.reduce(self._loss.clone(), reduce_op="mean")

    @override
    def _step_own(self, trainer: pl.Trainer, index: int, factor: float) -> None:
        if self._own is None or index not in self._owners:
            return
        index = self._owners.index(index)
        learner, scaler = self._learners[index], getattr(trainer.precision_plugin, "scaler", None)
        if not self._deadline:
            self._plan(trainer)
        if self._settled_at is not None:
            learner.gather_steps()
            self._own.step(index, factor, scaler)
            learner.follow()
            learner.write(widths=False)
            learner.clear()
            return
        if index == 0:
            self._penalty.take(self._loss)
        progress = min(max(self._penalty.steps - self.warmup, 0) / max(self._deadline - self.warmup, 1), 1.0)
        bits = self._all("bits")
        sizes = [len(one.bits) for one in self._learners]
        pull = self._aim.gradient(bits) * self._penalty.factor() * loss_scale(trainer)
        learner.gather(pull.split(sizes)[index])
        self._own.step(index, factor, scaler)
        moved = self._all("bits")
        before, now = (self._aim.project(share, moved).split(sizes)[index] for share in (self._progress, progress))
        learner.hold(before, now)
        if index == len(self._learners) - 1:
            self._progress = progress
        learner.write()
        learner.clear()
        if self._met_at is None and self._aim.met(self._all("bits")):
            self._met_at = trainer.global_step
        arrived = progress >= 1.0 or (self.budget is None and self._met_at is not None)
        if arrived and index == len(self._learners) - 1:
            self._settle(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the widths: means over values of weights, and over activations."""
        bits = self._all("bits")
        for name, shares in self._shares.items():
            pl_module.log(name, bits @ shares, prog_bar=True)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make widths integers if training ended before its time; prune channels that are all zeros by now."""
        if self._settled_at is None and self._learners:
            self._settle(trainer)
        prune_silent(pl_module)
        super().on_train_end(trainer, pl_module)

    def _settle(self, trainer: pl.Trainer) -> None:
        """Make all widths integers; from now on steps are learned alone."""
        module = trainer.lightning_module
        widths = self._aim.integers(self._all("bits"))
        for learner, part in zip(self._learners, widths.split([len(one.bits) for one in self._learners]), strict=True):
            learner.settle(part)
        self._settled_at = trainer.global_step
        set_final_widths(module, {})
        if self._met_at is None:
            self._met_at = self._settled_at
        self._use_integers(module)
        if self._own is not None:  # what gradients were on the way down is no measure of what they are now
            self._own = self._adam(self._own.lr)
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

    def _all(self, name: str) -> Tensor:
        """What the learners have under a name, one after the other."""
        return torch.cat([getattr(learner, name) for learner in self._learners])

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """That of `FineTune`, what is learned to the bit, and how far the widths have come."""
        state = super().state_dict()
        if self._learners:
            state["noise_scale"] = {
                "parts": [learner.state() for learner in self._learners],
                "start": self._aim.start,
                "progress": self._progress,
                "penalty": (self._penalty.steps, float(self._penalty.loss)),
                "met_at": self._met_at,
                "settled_at": self._settled_at,
            }
        return state
