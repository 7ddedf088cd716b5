"""Reduce widths one bit at a time while training, instead of all at once before it.

The network has adapted to each width before the next one comes. A learned step is scaled as the steps that fit the two
widths are (`lq.calibration.refitting`). Source: Zhuang et al., Towards Effective Low-bitwidth Convolutional Neural
Networks, CVPR 2018 (progressive quantization from higher to lower widths).
"""

import math
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lq.attachment.sites import quantizers, require_attached
from lq.calibration.refitting import change_widths, fitted_steps
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.final_widths import ChangesWidths
from lq.callbacks.trainer.optimizers import steps_of
from lq.errors import SpecError
from lq.quantizer.final_widths import set_final_widths, unfinished_widths
from lq.quantizer.spec import check_bits


class ReduceBits(ChangesWidths):
    """Begin training at more bits than asked for, and come down one by one.

    The widths asked for are those that `Quantize` or `AllocateBits`, before this in the list, have given. Until they
    are reached no score counts, neither for ``ModelCheckpoint(monitor=...)`` nor for EarlyStopping, and checkpoints say
    that they are unfinished where they are used.

    Args:
        start: width of all quantizers at the beginning, in bits; those that have more keep it.
        until: share of the run after which widths are those asked for.

    Example::

        callbacks = [Quantize(2, 2, fold_bn=False), ReduceBits(start=4), FineTune()]
    """

    def __init__(self, start: int = 4, until: float = 0.5) -> None:
        super().__init__()
        if not 0 < until <= 1:
            raise SpecError(f"until={until} is no share of a run; give a number above 0, at most 1")
        self.start = check_bits(start)
        self.until = until

    @override
    def _begin(self) -> None:
        super()._begin()
        self._targets: dict[str, torch.Tensor] = {}
        self._fitted: dict[str, torch.Tensor] = {}
        self._progress = 0.0  # share of the way that is done
        self._distinct: list[float] = []  # widths asked for, and bits above them now
        self._levels: list[int] = []

    @override
    def _final(self) -> bool:
        return not any(level for level, bits in zip(self._levels, self._distinct, strict=True) if bits)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the widths asked for and begin higher; go on where a run before this one has come."""
        require_attached(pl_module, "ReduceBits")
        if not self._targets:
            self._targets = {q.name: q.bits.detach().clone() for q in quantizers(pl_module)}
            self._fitted = fitted_steps(pl_module, min(self.start, 8))
        self._distinct = sorted({bits for widths in self._targets.values() for bits in widths.reshape(-1).tolist()})
        self._levels = []
        self._set(trainer, pl_module, self._progress)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Come down; never up again, in a longer run that goes on from the end of this one."""
        total = steps_of(trainer)
        if math.isinf(total):
            raise SpecError("ReduceBits needs the number of steps; set max_epochs or max_steps on the Trainer")
        progress = min(trainer.global_step / max(self.until * total, 1.0), 1.0)
        self._progress = max(progress, self._progress)
        self._set(trainer, pl_module, self._progress)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the widths asked for have not been reached."""
        left = unfinished_widths(pl_module)
        if left:
            name, (now, final) = next(iter(left.items()))
            warnings.warn(
                f"ReduceBits: the run ended before the widths asked for were reached ({name} and {len(left) - 1} "
                f"others: {now:.3g} bits instead of {final:.3g}); train longer, or reach them earlier with until=, or "
                "leave ReduceBits out where nothing is trained",
                UserWarning,
                stacklevel=2,
            )

    def _set(self, trainer: pl.Trainer, module: pl.LightningModule, progress: float) -> None:
        """Give the widths that belong to a share of the way."""
        levels = [math.ceil(max(self.start - bits, 0) * (1 - progress) - 1e-6) for bits in self._distinct]
        if levels == self._levels:  # on the host: no step waits for a device
            return
        self._levels = levels
        changed = {}
        for quantizer in quantizers(module):
            target = self._targets[quantizer.name].to(quantizer.bits.device)
            above = (self.start - target).clamp(min=0.0) * (target > 0)  # what is pruned stays so
            widths = target + torch.ceil(above * (1 - progress) - 1e-6).clamp(min=0.0)
            if not torch.equal(widths, quantizer.bits):
                changed[quantizer.name] = widths
        if changed:
            change_widths(module, changed, self._fitted)
        set_final_widths(module, self._targets)
        if changed:
            give_to_averages(trainer, module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The widths asked for, the steps that fit activations on the way there, and how much of it is done."""
        return {"asked": self._targets, "fitted": self._fitted, "progress": self._progress} if self._targets else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state_dict)
        self._targets, self._fitted = state_dict["asked"], state_dict["fitted"]
        self._progress = state_dict.get("progress", 0.0)
