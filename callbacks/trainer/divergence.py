"""Looks for training that diverges, and says so: a loss that is no number, one that rises, ranges that run away."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lq.errors import DivergenceError, DivergenceWarning
from lq.quantizer.quantizer import Quantizer

# Steps that are looked at together, so that a GPU is waited for once in a while only.
_WINDOW = 25
# The loss of a window against that of the first, and how often in a row, that is called divergence: a network that has
# converged loses a little when it is trained on, and more at the peak of a schedule.
_RISE, _PATIENCE = 4.0, 6
# Octaves that a range may move.
_DRIFT = 5.0


class DivergenceWatch:
    """Raises or warns when training goes wrong; each warning is given once.

    Args:
        members: quantizers whose ranges are looked at.
    """

    def __init__(self, members: Sequence[Quantizer]) -> None:
        self.members = list(members)
        #: While widths come down the loss goes up.
        self.expects_rise = False
        self.warned: set[str] = set()
        self.restart()

    def restart(self) -> None:
        """Compare with what comes from now on."""
        self._first: float | None = None  # mean loss of the first window, or twice the first loss if that is less
        self._risen = 0
        self._losses: list[Tensor] = []
        self._steps = 0
        self._ranges = self._log2_ranges()

    def see(self, outputs: Any, step: int) -> None:
        """Take in what the training step returned.

        Raises:
            DivergenceError: if the loss is not finite.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._steps += 1
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
            if loss.device.type == "cpu":
                self._check_finite(float(loss), step)
        if self._steps < _WINDOW:
            return
        if self._losses:
            mean = float(torch.stack(self._losses).float().mean())
            self._check_finite(mean, step)
            if not self.expects_rise:
                self._check_rise(mean, step)
        self._check_ranges(step)
        self._losses, self._steps = [], 0

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise DivergenceError(
                f"training diverged: the loss is {loss} at step {step}; lower the learning rate or quantizer_lr, warm "
                "up (warmup=), or clip gradients (Trainer(gradient_clip_val=...)), and go on from the last checkpoint"
            )

    def _check_rise(self, mean: float, step: int) -> None:
        if self._first is None:
            self._first = min(mean, 2 * float(self._losses[0]))
        self._risen = self._risen + 1 if mean > _RISE * self._first else 0
        if self._risen >= _PATIENCE:
            self._warn(
                "loss",
                f"training diverges: the loss rose from {self._first:.3g} to {mean:.3g} (means of {_WINDOW} steps, "
                f"step {step}) and stays there; lower the learning rate or quantizer_lr, or warm up (warmup=)",
            )

    def _check_ranges(self, step: int) -> None:
        drift = (self._log2_ranges() - self._ranges).abs().nan_to_num(0.0, posinf=0.0)  # found later: no drift
        if bool((drift > _DRIFT).any()):
            sizes = torch.tensor([max(q.bits.numel(), 1) for q in self.members])
            name = self.members[int(torch.searchsorted(sizes.cumsum(0), int(drift.argmax()), right=True))].name
            self._warn(
                "range",
                f"training diverges: the range of {name} moved by a factor of 2^{float(drift.max()):.1f} by step "
                f"{step}, away from its values; lower quantizer_lr",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, DivergenceWarning, stacklevel=2)

    @torch.no_grad()
    def _log2_ranges(self) -> Tensor:
        found = [(q.log2_step + q.bits).reshape(-1) for q in self.members]
        return torch.cat(found) if found else torch.zeros(0)
