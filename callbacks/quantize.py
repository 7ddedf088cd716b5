"""Attach quantizers when the Trainer sets up, calibrate them when fitting starts.

Attaching happens in ``setup``, for every stage: what is attached there is present when checkpoints are restored, when
DDP wraps the model and when optimizers are built. What there is to quantize is found by running the module once
(`lq.inspect`) on its ``example_input_array`` or on two samples of the stage's data. Layers that the module builds in
its own ``setup`` or in ``configure_model`` come later, but before all that: there, attaching follows
``configure_model``. Calibration needs data, device and ranks, so it runs in ``on_fit_start``; a resumed run has its
ranges from the checkpoint and skips it.
"""

import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lq.attachment.attach import attach_by, detach
from lq.attachment.options import QuantizeOptions
from lq.attachment.sites import activation_quantizers, is_attached, layers
from lq.attachment.summary import summary
from lq.attachment.targets import check_model
from lq.calibration.calibration import needs_calibration
from lq.callbacks.trainer.averages import keep_averages_exact
from lq.callbacks.trainer.checkpoints import save_result
from lq.callbacks.trainer.data import calibrate_on_training_data
from lq.callbacks.trainer.folding import fold_planned, folds, warn_of_folded
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.preparation import Preparation
from lq.callbacks.trainer.preparing import (
    initialise_lazy_layers,
    is_uninitialised,
    leave_checkpoints_alone,
    rebuild_from_checkpoint,
    require_values,
)
from lq.callbacks.trainer.pruning import check_parametrizations, check_zeros, prune_float_weights, warn_of_lost_zeros
from lq.callbacks.trainer.same import require_same
from lq.callbacks.trainer.structure import example_of, inspect_module, tell_unseen
from lq.callbacks.trainer.surroundings import check_order, check_strategy, copying_callbacks, put_running_last
from lq.callbacks.trainer.untrained import UntrainedWeights, build_as_float
from lq.errors import StateError
from lq.options import takes
from lq.quantizer.final_widths import warn_if_unfinished
from lq.quantizer.targets import target_of
from lq.structure.structure import Structure


class Quantize(ModuleCallback):
    """Quantize the layers of a LightningModule: fold BatchNorms, attach quantizers, calibrate on training data.

    With ``Trainer(max_epochs=0)`` this is post-training quantization; with epochs, the start of fine-tuning.

    ``Trainer.validate``, ``test`` and ``predict`` before any fit, without a quantized checkpoint, run the float module.

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(weights=8, activations=8)]).fit(module, datamodule)
    """

    @takes(QuantizeOptions)
    def __init__(self, options: QuantizeOptions) -> None:
        super().__init__()
        self.options = options

    @override
    def _begin(self) -> None:
        self._structure: Structure | None = None  # what quantizers were attached by
        self._evaluated: weakref.ref[torch.nn.Module] | None = None  # what an evaluation has attached quantizers to
        self._untrained = UntrainedWeights()
        self.preparation: Preparation | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fold and attach, once."""
        super().setup(trainer, pl_module, stage)
        check_strategy(trainer)
        put_running_last(trainer)
        rebuild_from_checkpoint(pl_module, self._before_restoring)
        if stage == "fit":
            build_as_float(pl_module)
        prune_float_weights(trainer, self)
        evaluated = None if self._evaluated is None else self._evaluated()
        if evaluated is pl_module and folds(self.options, trainer, stage) and is_attached(pl_module):
            detach(pl_module)  # an evaluation has folded nothing
        if is_attached(pl_module):
            require_same(pl_module, self.options, self._structure)
            return
        check_order(trainer, self)
        if is_overridden("configure_model", pl_module) or not (is_uninitialised(pl_module) or any(layers(pl_module))):
            self._attach_after_configuring(trainer, pl_module, stage)
        else:
            self._attach(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate on training data, unless a checkpoint brought the ranges."""
        check_parametrizations(pl_module)
        if not needs_calibration(pl_module):
            return
        if self.preparation is not None:
            self.preparation.apply(trainer, pl_module, self.options)
        calibrate_on_training_data(trainer, pl_module, self.options.calibration_samples, self.options.forward)
        rank_zero_info(f"Quantized {type(pl_module).__name__}: {summary(pl_module).total()}")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what is folded, what will be pruned and the widths of now, and soon at the optimizers."""
        if (target := target_of(self.options.target)) is not None:
            check_model(pl_module, target)
        warn_of_folded(pl_module)
        check_zeros(trainer, pl_module)
        self._untrained.expect()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first step, when all callbacks have had their turn: warn of weights that no optimizer holds."""
        self._untrained.look(pl_module, trainer.optimizers)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what was pruned."""
        keep_averages_exact(trainer, pl_module)
        warn_of_lost_zeros(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what no ModelCheckpoint has saved: a network that is not trained, or is changed after training."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step == 0:
            save_result(trainer, "quantized")
        elif any(getattr(callback, "changed_after_training", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            save_result(trainer, "finished")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before any fit, evaluate the float module; say so if the network has more bits than were asked for."""
        keep_averages_exact(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._before_running(pl_module, "which is evaluated,")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before any fit, evaluate the float module; say so if the network has more bits than were asked for."""
        self._before_running(pl_module, "which is evaluated,")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before any fit, predict with the float module; say so if the network has more bits than were asked for."""
        self._before_running(pl_module, "which predicts,")

    def _before_running(self, module: pl.LightningModule, what: str) -> None:
        """Take the quantizers off if no activation has a range: neither fit nor a checkpoint brought any."""
        activations = activation_quantizers(module).values()
        if activations and not any(quantizer.calibrated for quantizer in activations):
            detach(module)
            rank_zero_info(
                f"Quantize: {type(module).__name__} runs in float, its quantizers get their ranges when fit starts; "
                "to run a quantized one, call fit first (Trainer(max_epochs=0) only calibrates) or pass ckpt_path="
            )
        warn_if_unfinished(module, f"{type(module).__name__}, {what}")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module's own hook."""
        super().teardown(trainer, pl_module, stage)
        leave_checkpoints_alone(pl_module)

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        require_values(module)
        options = self.options
        if is_uninitialised(module):
            initialise_lazy_layers(module, example_of(trainer, module, options))
        inspection = inspect_module(trainer, module, options)
        if folds(options, trainer, stage) and fold_planned(module, options, inspection) and inspection.example:
            inspection = inspect_module(trainer, module, options)  # tensors flow from other modules now
        self._structure = inspection.structure
        if options.prepare and stage == "fit":
            example = inspection.example or example_of(trainer, module, options)
            self.preparation = Preparation(module, example, options.with_structure(self._structure))
        attach_by(module, options.with_structure(self._structure))
        tell_unseen(module, self._structure)
        if stage != "fit":
            self._evaluated = weakref.ref(module)

    def _attach_after_configuring(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Attach when ``configure_model``, which may build the layers, has run."""
        configure = module.configure_model

        def configure_model() -> None:
            del module.__dict__["configure_model"]
            configure()
            if not is_attached(module):
                self._attach(trainer, module, stage)

        module.configure_model = configure_model  # type: ignore[method-assign]

    def _before_restoring(self, module: pl.LightningModule, otherwise: bool) -> bool:
        """Raise if another callback has copied the module, and a checkpoint has its BatchNorms folded otherwise.

        Returns:
            Whether quantizers were placed by the classes of layers alone.
        """
        self._evaluated = None  # what it has now comes from a checkpoint
        copying = copying_callbacks(module)
        if otherwise and copying and module.trainer.state.fn == "fit":
            raise StateError(
                f"the checkpoint has BatchNorms folded otherwise than Quantize(fold_bn={self.options.fold_bn!r}) does "
                f"here, and {copying[0]} has copied the module already; give Quantize the fold_bn (True or False) of "
                "the run that wrote it"
            )
        return self._structure is None
