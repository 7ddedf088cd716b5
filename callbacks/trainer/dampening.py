"""Dampening in a Trainer: weights are drawn to their levels, the more the longer training goes on.

The loss and its gradient are `lq.training.dampening`'s.
"""

import math
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lq.callbacks.trainer.optimizers import scales_before_step, share_of_run
from lq.training.dampening import add_dampening
from lq.training.quantized_weights import QuantizedWeight, quantized_weights


class Dampening:
    """Adds the gradients before steps of optimizers, each to the weights that it holds.

    Args:
        strength: factor on the loss at the end of the training; a cosine leads there from 0. 0: nothing is done.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._weights: list[QuantizedWeight] = []
        self._held: dict[int, tuple[tuple[int, ...], list[QuantizedWeight]]] = {}  # by the identity of an optimizer
        self._losses: dict[int, Tensor | float] = {}

    def start(self, module: pl.LightningModule) -> None:
        """Find the weights of a module."""
        self.stop()
        if self.strength:
            self._weights = quantized_weights(module)

    def add(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Add the gradient to those that an optimizer is about to use."""
        if not self.strength:
            return
        done = share_of_run(trainer, f"dampening={self.strength}")
        stepped: Any = getattr(optimizer, "optimizer", optimizer)
        strength = self.strength * 0.5 * (1 - math.cos(math.pi * done))
        scale, _ = scales_before_step(trainer, stepped)
        self._losses[id(stepped)] = add_dampening(self._of(stepped), strength, scale)

    def _of(self, optimizer: Optimizer) -> list[QuantizedWeight]:
        """The weights that an optimizer holds now."""
        held = tuple(id(p) for group in optimizer.param_groups for p in group["params"])
        if self._held.get(id(optimizer), ((), []))[0] != held:
            there = set(held)
            self._held[id(optimizer)] = held, [weight for weight in self._weights if id(weight.parameter) in there]
        return self._held[id(optimizer)][1]

    def log(self, module: pl.LightningModule) -> None:
        """Log the loss, without its factor, as ``dampening_loss``: that of the last step of each optimizer."""
        if self._losses:
            module.log("dampening_loss", sum(self._losses.values()))

    def stop(self) -> None:
        """Hold no weight."""
        self._weights, self._held, self._losses = [], {}, {}
