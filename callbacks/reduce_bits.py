"""Reduce widths one bit at a time while training, instead of all at once before it.

The network has adapted to each width before the next one comes. A learned step is scaled as the steps that fit the two
widths are (`lq.refitting`). Source: Zhuang et al., Towards Effective Low-bitwidth Convolutional Neural Networks, CVPR
2018 (progressive quantization from higher to lower widths).
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lq.callbacks.averages import give_to_averages
from lq.callbacks.optimizers import steps_of
from lq.errors import SpecError
from lq.refitting import change_widths, fitted_steps
from lq.sites import quantizers, require_attached
from lq.spec import check_bits


class ReduceBits(pl.Callback):
    """Begin training at more bits than asked for, and come down one by one.

    The widths asked for are those that `Quantize` or `AllocateBits`, before this in the list, have given.

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
        self._asked: dict[str, torch.Tensor] = {}
        self._fitted: dict[str, torch.Tensor] = {}
        self._distinct: list[float] = []  # widths asked for, and bits above them now
        self._levels: list[int] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the widths asked for and begin higher; a resumed run has done so."""
        require_attached(pl_module, "ReduceBits")
        self._levels = []
        if not self._asked:
            self._asked = {q.name: q.bits.detach().clone() for q in quantizers(pl_module)}
            self._fitted = fitted_steps(pl_module, min(self.start, 8))
            self._set(trainer, pl_module, 0.0)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Come down."""
        total = steps_of(trainer)
        if math.isinf(total):
            raise SpecError("ReduceBits needs the number of steps; set max_epochs or max_steps on the Trainer")
        self._set(trainer, pl_module, min(trainer.global_step / max(self.until * total, 1.0), 1.0))

    def _set(self, trainer: pl.Trainer, module: pl.LightningModule, progress: float) -> None:
        """Give the widths that belong to a share of the way."""
        if not self._distinct:
            self._distinct = sorted({bits for asked in self._asked.values() for bits in asked.reshape(-1).tolist()})
        levels = [math.ceil(max(self.start - asked, 0) * (1 - progress) - 1e-6) for asked in self._distinct]
        if levels == self._levels:  # on the host: no step waits for a device
            return
        self._levels = levels
        changed = {}
        for quantizer in quantizers(module):
            asked = self._asked[quantizer.name].to(quantizer.bits.device)
            above = (self.start - asked).clamp(min=0.0) * (asked > 0)  # what is pruned stays so
            widths = asked + torch.ceil(above * (1 - progress) - 1e-6).clamp(min=0.0)
            if not torch.equal(widths, quantizer.bits):
                changed[quantizer.name] = widths
        if changed:
            change_widths(module, changed, self._fitted)
            give_to_averages(trainer, module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The widths asked for, and the steps that fit activations on the way there."""
        return {"asked": self._asked, "fitted": self._fitted} if self._asked else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._asked, self._fitted = state_dict["asked"], state_dict["fitted"]
