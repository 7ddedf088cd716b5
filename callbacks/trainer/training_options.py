"""The options of callbacks that train a quantized module: their names, defaults, texts and checks, written once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lq.allocation.budget import parse_budget
from lq.callbacks.trainer.schedules import Schedule
from lq.errors import SpecError
from lq.options import after
from lq.quantizer.estimators import Estimator
from lq.quantizer.estimators import estimator as estimator_of
from lq.training.distillation import Loss
from lq.training.noise_scale import target_widths

#: Learning rate of steps and ranges that are learned together, in octaves per update: GDNSQ's.
RATE = 2e-3


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What is trained how.

    Args:
        lr: learning rate of an optimizer that replaces the user's; None keeps the user's.
        schedule: "cosine" to zero or "noise_scale" (see `lq.callbacks.trainer.schedules`) replaces the user's
            schedulers, step by step; None keeps them.
        warmup: first steps of that schedule, over which the learning rate rises to it.
        quantizer_lr: learning rate of what is learned of quantizers.
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

    lr: float | None = None
    schedule: Schedule | None = None
    warmup: int = 0
    quantizer_lr: float | None = None
    freeze_bn_epoch: int | None = None
    reestimate_bn: int = 0
    distill: float = 0.0
    distill_loss: Loss = "kl"
    task: float = 1.0
    temperature: float = 1.0
    distill_from: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, (*get_args(Schedule), None))
        _check_choice("distill_loss", self.distill_loss, get_args(Loss))
        for name in ("lr", "quantizer_lr", "temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SpecError(f"{name}={value} must be positive")
        if self.warmup < 0 or (self.warmup and self.schedule is None):
            raise SpecError(f"warmup={self.warmup} belongs to schedule='cosine' or 'noise_scale', and is not negative")

    @property
    def rate(self) -> float:
        """The learning rate of what is learned of quantizers, where the schedule is at its peak."""
        return RATE if self.quantizer_lr is None else self.quantizer_lr

    def optimizer(self, weights: list[nn.Parameter], lr: float) -> Optimizer:
        """The optimizer that replaces the user's: RAdam."""
        return torch.optim.RAdam(weights, lr=lr)


@dataclass(frozen=True)
class FineTuneOptions(TrainingOptions):
    """The options of `lq.callbacks.FineTune`.

    Args:
        estimator: what is learned of the quantizers and how, by name: "lsq" learns the steps, "lsq_plus" the zero
            points of activations too, "ewgs" and "adaptive_ewgs" weigh gradients by rounding errors, "stableqat"
            those of weights by the slope of a smoothed rounding, "noise_scale" adds noise to the steps' gradients,
            "ste" leaves quantizers as calibrated; or an `lq.quantizer.estimators.Estimator`.
        momentum: of that optimizer, an SGD.
        weight_decay: of that SGD.
        quantizer_lr: learning rate of the quantizers' own Adam, in octaves of a step (for zero points: in ranges) per
            update; follows the schedule.
        dampening: factor on a loss that draws weights to their levels, ``||Q(w) - clip(w)||^2`` summed over all of
            them, where training ends; a cosine leads there from 0 (see `lq.training.dampening`). 0: none.
    """

    estimator: str | Estimator = "lsq"
    momentum: float = field(default=0.9, kw_only=True, metadata=after("lr"))
    weight_decay: float = field(default=5e-5, kw_only=True, metadata=after("momentum"))
    quantizer_lr: float = field(default=1e-3, kw_only=True)
    dampening: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dampening < 0:
            raise SpecError(f"dampening={self.dampening} is negative: it would drive weights away from their levels")
        estimator_of(self.estimator)

    @override
    def optimizer(self, weights: list[nn.Parameter], lr: float) -> Optimizer:
        """The optimizer that replaces the user's: SGD."""
        return torch.optim.SGD(weights, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class LearnNoiseScaleOptions(TrainingOptions):
    """The options of `lq.callbacks.LearnNoiseScale`.

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
        task: factor on the gradient of your own loss while distilling; 0, as in GDNSQ: the float copy is the only
            teacher.
    """

    weights: int | None = 4
    activations: int | None = 4
    budget: float | str | None = None
    first_last: int | None = field(default=8, kw_only=True, metadata=after("budget"))
    pins: Mapping[str, int] | None = field(default=None, kw_only=True, metadata=after("first_last"))
    until: float = field(default=0.1, kw_only=True, metadata=after("pins"))
    distill: float = field(default=1.0, kw_only=True)
    distill_loss: Loss = field(default="symmetric_kl", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        target_widths(nn.Identity(), self.weights, self.activations, first_last=self.first_last)
        if not 0 < self.until <= 1:
            raise SpecError(f"until={self.until} is no share of a run; give a number above 0, at most 1")
        if self.budget is not None and parse_budget(self.budget).kind not in ("bits", "compression", "bytes"):
            raise SpecError(f"budget={self.budget!r}: widths are learned within mean bits, a compression or bytes")


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={value!r} is unknown; use one of {tuple(choices)}")
