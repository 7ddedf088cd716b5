"""Widths that are learned, on their way from where they start to what they are brought to, and integers in the end."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lq.attachment.sites import quantizers
from lq.calibration.refitting import fit_ranges
from lq.callbacks.trainer.ownership import owned
from lq.callbacks.trainer.training_options import LearnNoiseScaleOptions
from lq.callbacks.trainer.width_aims import (
    aim_of,
    by_learner,
    joined,
    mean_widths,
    shares_of_steps,
    sharing,
    widths_at_the_end,
)
from lq.quantizer.final_widths import set_final_widths
from lq.training.noise_scale import HEAD, Penalty, WidthLearner, target_widths

# Steps after which widths are integers in a run that has no end.
_ENDLESS = 1000


class WidthDescent:
    """The learners of all widths of a module, and how far they have come.

    Args:
        module: a quantized module, whose ranges are fitted to the widths in the end.
        optimizers: the user's; a learner belongs to each.
        options: targets or budget, and how fast.
        saved: the `state` of a run that is resumed; None: the way begins.

    Attributes:
        learners: one for each optimizer that has quantizers.
        met_at: step at which all widths were at their targets; None: they are not.
        settled_at: step at which they became integers; None: they are not.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        options: LearnNoiseScaleOptions,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.options = options
        targets = self._targets(module)
        if saved is None:
            fit_ranges(module, {**mean_widths(module, options.budget), **targets}, HEAD)
        moving = {*targets, *sharing(module, options.budget)}
        staying = {q.name: q.bits.detach().clone() for q in quantizers(module) if q.name not in moving}
        groups = [list(group.values()) for group in owned(module, optimizers, 0)]
        self.learners = [WidthLearner(group, {**targets, **staying}) for group in groups if group]
        self._owners = [index for index, group in enumerate(groups) if group]  # the optimizer that each belongs to
        self.met_at: int | None = None
        self.settled_at: int | None = None
        self._progress, self._deadline = 0.0, 0
        start = joined(self.learners, "start")
        self.penalty = Penalty(2 * options.rate, options.warmup)
        if saved is not None:
            start = saved["start"].to(start.device)
            self.met_at, self.settled_at = saved["met_at"], saved["settled_at"]
            self._progress = saved["progress"]
            self.penalty.steps, self.penalty.loss = saved["penalty"]
            for learner, parts in zip(self.learners, saved["parts"], strict=True):
                learner.load(parts)
        self._aim = aim_of(module, self.learners, options.budget, start)
        self._shares = shares_of_steps(module, self.learners)
        set_final_widths(module, {} if self.final else widths_at_the_end(self.learners, self._aim))

    def _targets(self, module: nn.Module) -> dict[str, float]:
        options = self.options
        return target_widths(
            module,
            options.weights if options.budget is None else None,
            options.activations,
            first_last=options.first_last,
            pins=options.pins,
        )

    @property
    def final(self) -> bool:
        """Whether widths no longer change."""
        return self.settled_at is not None or not self.learners

    @property
    def bits(self) -> Tensor:
        """The width of each step now, of all learners."""
        return joined(self.learners, "bits")

    @property
    def parameters(self) -> list[dict[str, nn.Parameter]]:
        """What is learned, for each learner, by name."""
        return [
            {f"{number}.{name}": parameter for name, parameter in learner.parameters.items()}
            for number, learner in enumerate(self.learners)
        ]

    def widths(self) -> dict[str, float]:
        """The mean width of each tensor, by name of its quantizer."""
        return {
            quantizer.name: float(bits.mean())
            for learner in self.learners
            for quantizer, bits in zip(learner.members, learner.bits.split(learner.sizes), strict=True)
        }

    def means(self) -> dict[str, Tensor]:
        """The mean width over values of weights, and over activations."""
        bits = self.bits
        return {name: bits @ shares for name, shares in self._shares.items()}

    def plan(self, total: float) -> None:
        """Spread the way over a run of so many steps, if that was not done."""
        self._deadline = max(int(self.options.until * total), 1) if math.isfinite(total) else _ENDLESS

    @property
    def planned(self) -> bool:
        """Whether it is known how many steps there are."""
        return self._deadline > 0

    def learner_of(self, optimizer: int) -> int | None:
        """Number of the learner that belongs to one of the user's optimizers."""
        return self._owners.index(optimizer) if optimizer in self._owners else None

    def step_alone(self, index: int, optimize: Callable[[], None]) -> None:
        """Step a learner when widths are integers: `optimize` moves the steps."""
        learner = self.learners[index]
        learner.gather_steps()
        optimize()
        learner.follow()
        learner.write(widths=False)
        learner.clear()

    def step(
        self, index: int, optimize: Callable[[], None], loss: Tensor | None, scale: float | Tensor, at: int
    ) -> bool:
        """Step a learner towards the aim.

        Args:
            index: number of the learner.
            optimize: moves steps and ranges by their gradients.
            loss: what the penalty is measured by.
            scale: factor on gradients by mixed precision.
            at: number of the step in the run.

        Returns:
            Whether all widths are to become integers now.
        """
        learner, last = self.learners[index], index == len(self.learners) - 1
        if index == 0:
            self.penalty.take(loss)
        warmup = self.options.warmup
        progress = min(max(self.penalty.steps - warmup, 0) / max(self._deadline - warmup, 1), 1.0)
        pull = self._aim.gradient(self.bits) * self.penalty.factor() * scale
        learner.gather(by_learner(pull, self.learners)[index])
        optimize()
        moved = self.bits
        before, now = (
            by_learner(self._aim.project(share, moved), self.learners)[index] for share in (self._progress, progress)
        )
        learner.hold(before, now)
        if last:
            self._progress = progress
        learner.write()
        learner.clear()
        if self.met_at is None and self._aim.met(self.bits):
            self.met_at = at
        arrived = progress >= 1.0 or (self.options.budget is None and self.met_at is not None)
        return arrived and last

    def settle(self, module: nn.Module, at: int) -> None:
        """Make all widths integers, at a step of the run."""
        widths = self._aim.integers(self.bits)
        for learner, part in zip(self.learners, by_learner(widths, self.learners), strict=True):
            learner.settle(part)
        self.settled_at = at
        if self.met_at is None:
            self.met_at = at
        set_final_widths(module, {})

    def state(self) -> dict[str, Any]:
        """What is learned to the bit, and how far widths have come."""
        return {
            "parts": [learner.state() for learner in self.learners],
            "start": self._aim.start,
            "progress": self._progress,
            "penalty": (self.penalty.steps, float(self.penalty.loss)),
            "met_at": self.met_at,
            "settled_at": self.settled_at,
        }
