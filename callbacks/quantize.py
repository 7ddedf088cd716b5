"""Attach quantizers when the Trainer sets up, calibrate them when fitting starts.

Attaching happens in ``setup``, for every stage: what is attached there is present when checkpoints are restored, when
DDP wraps the model and when optimizers are built. Calibration needs data, device and ranks, so it runs in
``on_fit_start``; a resumed run has its ranges from the checkpoint and skips it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lq.attach import attach, attached_plan
from lq.calibration import Forward, calibrate, needs_calibration
from lq.callbacks.data import forward_of, reduce_over, training_batches
from lq.errors import SpecError, StateError
from lq.folding import fold_batchnorm
from lq.report import summary
from lq.scheme import Override, plan_layers
from lq.sites import is_attached
from lq.spec import QuantSpec

_COPYING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")


class Quantize(pl.Callback):
    """Quantize the layers of a LightningModule: fold BatchNorms, attach quantizers, calibrate on training data.

    With ``Trainer(max_epochs=0)`` this is post-training quantization; with epochs, the start of fine-tuning.

    Args:
        weights: width in bits (0..8, 16), a `QuantSpec`, or None to leave weights in float.
        activations: the same for the input of each quantized layer.
        fold_bn: fold BatchNorms into the convolutions before them. Post-training work wants this; training from
            few bits is more stable with BatchNorms kept.
        first_last: least width of the first and last layers; None: no exception.
        include: name patterns of the only layers to quantize.
        exclude: name patterns of layers to leave in float.
        overrides: other widths by name pattern, such as ``{"model.layer4": {"weights": 2}}``.
        calibration_samples: training samples to calibrate on, over all ranks.
        forward: called with the module and a batch to calibrate with; by default the module's
            ``calibration_step(batch)`` if it has one, else its forward on the batch (or the first part of it).

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(weights=8, activations=8)]).fit(module, datamodule)
    """

    def __init__(
        self,
        weights: int | QuantSpec | None = 8,
        activations: int | QuantSpec | None = 8,
        *,
        fold_bn: bool = True,
        first_last: int | None = 8,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        overrides: Mapping[str, Override] | None = None,
        calibration_samples: int = 512,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if calibration_samples < 1:
            raise SpecError(f"calibration_samples={calibration_samples}; calibration needs at least 1")
        self.weights = weights
        self.activations = activations
        self.fold_bn = fold_bn
        self.calibration_samples = calibration_samples
        self.forward = forward
        self._choice: dict[str, Any] = {
            "first_last": first_last,
            "include": include,
            "exclude": exclude,
            "overrides": overrides,
        }
        if weights is not None or activations is not None or overrides:
            plan_layers(torch.nn.Identity(), weights, activations, first_last=first_last)  # wrong widths fail here

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fold and attach, once."""
        if is_attached(pl_module):
            self._check_same(pl_module)
            return
        self._check_order(trainer)
        if self.fold_bn:
            fold_batchnorm(pl_module)
        attach(pl_module, self.weights, self.activations, **self._choice)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate on training data, unless a checkpoint brought the ranges."""
        if not needs_calibration(pl_module):
            return
        calibrate(
            pl_module,
            training_batches(trainer, self.calibration_samples, "Calibrating"),
            forward=forward_of(trainer, pl_module, self.forward),
            reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
        )
        rank_zero_info(f"Quantized {type(pl_module).__name__}: {summary(pl_module).total()}")

    def _check_same(self, module: pl.LightningModule) -> None:
        """Raise if the module was quantized otherwise than this callback says."""
        present = attached_plan(module)
        if present is None:
            return  # quantizers built from a checkpoint
        wanted = plan_layers(module, self.weights, self.activations, **self._choice)
        if present != wanted:
            name = next(name for name in [*wanted, *present] if wanted.get(name) != present.get(name))
            raise StateError(
                f"{type(module).__name__} is quantized already, and not as this Quantize callback says: at {name!r} it "
                f"has {present.get(name)}, asked is {wanted.get(name)}; "
                "lq.detach(module) first, or use the same arguments"
            )

    def _check_order(self, trainer: pl.Trainer) -> None:
        """Raise if a callback before this one has copied the module without quantizers."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is self:
                return
            if type(callback).__name__ in _COPYING:
                raise StateError(
                    f"{type(callback).__name__} copies the module before Quantize has attached quantizers to it; "
                    "list Quantize before it in Trainer(callbacks=[...])"
                )
