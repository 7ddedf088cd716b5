"""Attach quantizers when the Trainer sets up, calibrate them when fitting starts.

Attaching happens in ``setup``, for every stage: what is attached there is present when checkpoints are restored, when
DDP wraps the model and when optimizers are built. What there is to quantize is found by running the module once
(`lq.inspect`) on its ``example_input_array`` or on two samples of the stage's data. Layers that the module builds in
its own ``setup`` or in ``configure_model`` come later, but before all that: there, attaching follows
``configure_model``. Calibration needs data, device and ranks, so it runs in ``on_fit_start``; a resumed run has its
ranges from the checkpoint and skips it.
"""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lq.attachment.attach import attach, attached_plan, detach
from lq.attachment.folding import fold, folded_norms
from lq.attachment.scheme import KINDS, Override, PlannedSite, Skip, plan_sites
from lq.attachment.sites import (
    activation_quantizers,
    common_module,
    input_quantizer,
    is_attached,
    layers,
    quantizers,
    weight_quantizer,
)
from lq.attachment.summary import summary
from lq.attachment.unseen import unseen_layers
from lq.calibration.calibration import needs_calibration
from lq.callbacks.trainer.averages import keep_averages_exact
from lq.callbacks.trainer.checkpoints import class_names, save_result
from lq.callbacks.trainer.data import calibrate_on_training_data, first_batch, forward_of, run_example
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.preparing import (
    Preparation,
    initialise_lazy_layers,
    is_uninitialised,
    known_choice,
    leave_checkpoints_alone,
    rebuild_from_checkpoint,
    require_values,
)
from lq.callbacks.trainer.pruning import check_parametrizations, check_zeros, prune_float_weights, warn_of_lost_zeros
from lq.callbacks.trainer.steps import teachers_of
from lq.callbacks.trainer.untrained import build_as_float, warn_of_untrained
from lq.errors import DataError, NoEffectWarning, SpecError, StateError
from lq.quantizer.final_widths import warn_if_unfinished
from lq.quantizer.spec import QuantSpec
from lq.structure.forward import Forward
from lq.structure.inspection import inspect
from lq.structure.structure import Structure

_COPYING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_RUNNING = {"LearningRateFinder", "BatchSizeFinder", "ModelSummary"}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


class Quantize(ModuleCallback):
    """Quantize the layers of a LightningModule: fold BatchNorms, attach quantizers, calibrate on training data.

    With ``Trainer(max_epochs=0)`` this is post-training quantization; with epochs, the start of fine-tuning.

    ``Trainer.validate``, ``test`` and ``predict`` before any fit, without a quantized checkpoint, run the float module.

    Args:
        weights: width in bits (0..8, 16), a `QuantSpec`, or None to leave weights in float.
        activations: the same for the input of each quantized layer and for the operands of attention.
        structure: a `Structure`, or the path of one saved as JSON, instead of running the module once; its names may
            start at a submodule.
        skip: also quantize the tensors on skip paths (see `lq.attach`).
        share_concats: one range for all parts of a concatenation.
        integer: also quantize, to 8 bits, what engines need that compute in integers (see `lq.attach`).
        symmetric: zero is the middle level of every weight's grid; False gives each channel a zero point of its own.
        fold_bn: fold BatchNorms into the convolutions that are quantized. "auto" folds them if the Trainer fits without
            training (``max_epochs=0``), as post-training work wants it, and keeps them otherwise: training at few bits
            loses points without them, and exports fold those that are left. A checkpoint decides for itself.
        prepare: rescale, exactly, what norms give and the layers behind read, for few bits (see `lq.prepare`): "auto"
            where it gets fewer than 8 bits, True everywhere; ``preparation.report`` says what was done.
        first_last: least width of the first and last layers; None: no exception.
        include: name patterns of the only layers to quantize.
        exclude: name patterns of layers to leave in float.
        overrides: other widths by name pattern, such as ``{"model.layer4": {"weights": 2}}``.
        calibration_samples: training samples to calibrate on, over all ranks.
        forward: called with the module and a batch to calibrate with. By default the module's
            ``calibration_step(batch)`` if it has one; else its forward on the batch, on the first part of it or, of a
            dict, on the parts that its parameters are named like; else, where that fails, what its ``training_step``
            calls (in eval mode, without gradients, nothing is logged).

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(weights=8, activations=8)]).fit(module, datamodule)
    """

    def __init__(
        self,
        weights: int | QuantSpec | None = 8,
        activations: int | QuantSpec | None = 8,
        *,
        structure: Structure | str | Path | None = None,
        skip: Skip = False,
        share_concats: bool = False,
        integer: bool = False,
        symmetric: bool = True,
        fold_bn: bool | Literal["auto"] = "auto",
        prepare: bool | Literal["auto"] = False,
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
        if fold_bn not in (True, False, "auto"):
            raise SpecError(f"fold_bn={fold_bn!r} is unknown; use True, False or 'auto'")
        self.prepare = known_choice(prepare)
        self.weights = weights
        self.activations = activations
        self.fold_bn = fold_bn
        self.calibration_samples = calibration_samples
        self.forward = forward
        self.structure = structure
        self.skip = skip
        self.symmetric = symmetric
        self._choice: dict[str, Any] = {
            "symmetric": symmetric,
            "first_last": first_last,
            "include": include,
            "exclude": exclude,
            "overrides": overrides,
        }
        self._flow = {"skip": skip, "share_concats": share_concats, "integer": integer}
        if weights is not None or activations is not None or overrides:
            plan_sites(torch.nn.Identity(), weights, activations, first_last=first_last)  # wrong widths fail here

    @override
    def _begin(self) -> None:
        self._found: Structure | None = None
        self._example: tuple[Any, Forward] | None = None  # what the module was looked at with, and how it is run
        self._evaluated: weakref.ref[torch.nn.Module] | None = None  # what an evaluation has attached quantizers to
        self._looked = True
        self.preparation: Preparation | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fold and attach, once."""
        super().setup(trainer, pl_module, stage)
        _check_strategy(trainer)
        _put_running_last(trainer)
        rebuild_from_checkpoint(pl_module, self._before_restoring)
        if stage == "fit":
            build_as_float(pl_module)
        prune_float_weights(trainer, self)
        evaluated = None if self._evaluated is None else self._evaluated()
        if evaluated is pl_module and self._folds(trainer, stage) and is_attached(pl_module):
            detach(pl_module)  # an evaluation has folded nothing
        if is_attached(pl_module):
            self._check_same(pl_module)
            return
        self._check_order(trainer)
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
            self.preparation.apply(trainer, pl_module, self.calibration_samples, self.forward)
        calibrate_on_training_data(trainer, pl_module, self.calibration_samples, self.forward)
        rank_zero_info(f"Quantized {type(pl_module).__name__}: {summary(pl_module).total()}")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what is folded and what will be pruned, and soon at the optimizers."""
        _warn_of_folded(pl_module)
        check_zeros(trainer, pl_module)
        self._looked = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first step, when all callbacks have had their turn: warn of weights that no optimizer holds."""
        if not self._looked:
            self._looked = True
            warn_of_untrained(pl_module, trainer.optimizers)

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
        elif any(getattr(one, "changed_after_training", False) for one in trainer.callbacks):  # type: ignore[attr-defined]
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
        found = activation_quantizers(module).values()
        if found and not any(quantizer.calibrated for quantizer in found):
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
        if is_uninitialised(module):
            initialise_lazy_layers(module, self._look(trainer, module))
        self._found = self._structure(trainer, module)
        if self._folds(trainer, stage) and self._fold(module) and self._example is not None and self.structure is None:
            self._found = self._structure(trainer, module)  # tensors flow from other modules now
        if self.prepare and stage == "fit":
            example = self._example or self._look(trainer, module)
            self.preparation = Preparation(module, example, self._plan(module), self.prepare)
        attach(module, self.weights, self.activations, structure=self._found, **self._flow_of_tensors, **self._choice)
        self._tell_unseen(module)
        self._example = None
        if stage != "fit":
            self._evaluated = weakref.ref(module)

    def _tell_unseen(self, module: pl.LightningModule) -> None:
        """Say which layers the example did not reach."""
        names = [] if self._found is None else unseen_layers(module, self._found, KINDS)[0]
        unseen = [name for name in names if weight_quantizer(module.get_submodule(name)) is not None]
        if unseen:
            few = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
            rank_zero_info(f"Quantize: layers that the example did not reach are quantized by their class: {few}")

    @property
    def _flow_of_tensors(self) -> dict[str, Any]:
        """The arguments that need a structure, if there is one."""
        return self._flow if self._found is not None else {}

    def _folds(self, trainer: pl.Trainer, stage: str) -> bool:
        """Whether BatchNorms are folded: as asked, or if the Trainer fits and nothing is trained."""
        if self.fold_bn != "auto":
            return self.fold_bn
        still = trainer.max_epochs == 0 or trainer.max_steps == 0 or trainer.limit_train_batches == 0
        return stage == "fit" and still

    def _fold(self, module: pl.LightningModule) -> bool:
        """Fold the BatchNorms of layers that get quantizers; whether there were any."""
        plan = self._plan(module)
        convs = {planned.site.module for planned in plan.values()}
        if self._found is not None:
            convs &= {
                operation.name for operation in self._found.operations
            }  # networks that did not run stay as they are
        example, forward = (None, None) if self._example is None else self._example
        folding = fold(module, example, forward, convs=convs)
        if text := folding.warning():
            rank_zero_warn(text, category=NoEffectWarning)
        elif folding.left:
            rank_zero_info(f"Quantize left BatchNorms unfolded: {'; '.join(map(str, folding.left))}")
        return bool(folding.pairs)

    def _plan(self, module: pl.LightningModule) -> dict[str, PlannedSite]:
        """The sites that get quantizers."""
        flow, found = self._flow_of_tensors, self._found
        return plan_sites(module, self.weights, self.activations, structure=found, **flow, **self._choice)

    def _before_restoring(self, module: pl.LightningModule, otherwise: bool) -> bool:
        """Raise if another callback has copied the module, and a checkpoint has its BatchNorms folded otherwise.

        Returns:
            Whether quantizers were placed by the classes of layers alone.
        """
        self._evaluated = None  # what it has now comes from a checkpoint
        callbacks: list[pl.Callback] = module.trainer.callbacks if module._trainer is not None else []  # type: ignore[attr-defined]
        copying = [type(callback).__name__ for callback in callbacks if type(callback).__name__ in _COPYING]
        if otherwise and copying and module.trainer.state.fn == "fit":
            raise StateError(
                f"the checkpoint has BatchNorms folded otherwise than Quantize(fold_bn={self.fold_bn!r}) does here, "
                f"and {copying[0]} has copied the module already; give Quantize the fold_bn (True or False) of the "
                "run that wrote it"
            )
        return self._found is None

    def _attach_after_configuring(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Attach when ``configure_model``, which may build the layers, has run."""
        configure = module.configure_model

        def configure_model() -> None:
            del module.__dict__["configure_model"]
            configure()
            if not is_attached(module):
                self._attach(trainer, module, stage)

        module.configure_model = configure_model  # type: ignore[method-assign]

    def _structure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Structure | None:
        """The structure given, or found by running the module; None if it could not be run."""
        if self.structure is not None:
            given = self.structure
            found = given if isinstance(given, Structure) else Structure.load(given)
            missing = {site.module for site in found.sites} - dict(module.named_modules()).keys()
            return found.under(common_module(module)[0]) if missing else found
        try:
            self._example = self._look(trainer, module)
            if self._example is None and not any(self._flow.values()):
                rank_zero_info(
                    f"Quantize: neither example_input_array nor data to look at {type(module).__name__} with; its "
                    "layers are quantized by their class, or as the checkpoint has it"
                )
                return None
            example, forward = self._example or (None, forward_of(trainer, module, self.forward))
            with isolate_rng():
                found = inspect(module, example, forward=forward)
            return found.without(teachers_of(module))
        except DataError as error:
            self._example = None
            if any(self._flow.values()):
                raise
            rank_zero_warn(
                f"{type(module).__name__} could not be looked at: {error}. Its layers are quantized by their class; "
                "attention and other functional calls stay float. Set example_input_array, or pass forward= or "
                "structure= to Quantize"
            )
            return None

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[Any, Forward] | None:
        """An example to run the module on, and how; None if there is none."""
        if module.example_input_array is not None:
            return module.example_input_array, run_example
        batch = first_batch(trainer, module)
        return None if batch is None else (batch, forward_of(trainer, module, self.forward))

    def _check_same(self, module: pl.LightningModule) -> None:
        """Raise if the module was quantized otherwise than this callback says."""
        present = attached_plan(module)
        if present is None:
            return  # quantizers built from a checkpoint
        wanted = {name: found.spec for name, found in self._plan(module).items() if found.owner is None}
        if self._found is None:  # attached by another: what is not told by the layers' classes cannot be compared
            layered = {name: spec for name, spec in present.items() if name.endswith((".weight", ".input"))}
            shared = wanted.keys() - layered.keys() - {name for name in wanted if not _shares(module, name)}
            present, wanted = layered, {name: spec for name, spec in wanted.items() if name not in shared}
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


def _warn_of_folded(module: pl.LightningModule) -> None:
    """Warn if BatchNorms that training at few bits needs are folded."""
    folded = folded_norms(module)
    fewest = min((float(q.bits.detach().min()) for q in quantizers(module)), default=8.0) if folded else 8.0
    if fewest < 8 or (folded and any("bits" in q.estimator.learns for q in quantizers(module))):
        rank_zero_warn(
            f"{len(folded)} BatchNorms of {type(module).__name__} were folded, and it is trained at fewer than 8 bits: "
            "without their normalization such training is unstable and ends several points lower. Start from the "
            "float module with Quantize(fold_bn='auto') or False, which keep them; exports fold them"
        )


def _check_strategy(trainer: pl.Trainer) -> None:
    """Raise if the Trainer's strategy would split weights over devices: a part of a channel has no range."""
    if _SHARDING & class_names(trainer.strategy):
        raise StateError(
            f"Quantize does not work with {type(trainer.strategy).__name__}, which shards the weights that it rounds; "
            "use Trainer(strategy='ddp') or a single device"
        )


def _put_running_last(trainer: pl.Trainer) -> None:
    """Have callbacks that run the module in ``on_fit_start`` do so after lq's callbacks have calibrated.

    Searches for a learning rate or a batch size train there, and Lightning (its Tuner too) puts them first; summaries
    run the example. The list is replaced, not changed: the Trainer is iterating over it.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    end = 1 + max((i for i, callback in enumerate(callbacks) if _is_ours(callback)), default=-1)
    running = [callback for callback in callbacks[:end] if _RUNNING & class_names(callback)]
    if running:
        others = [callback for callback in callbacks[:end] if callback not in running]
        trainer.callbacks = [*others, *running, *callbacks[end:]]  # type: ignore[attr-defined]


def _is_ours(callback: pl.Callback) -> bool:
    """Whether it is one of lq's callbacks, or a subclass."""
    return any(base.__module__.startswith("lq.callbacks.") for base in type(callback).__mro__)


def _shares(module: torch.nn.Module, site: str) -> bool:
    """Whether the input of a layer is quantized by the quantizer of another."""
    layer, _, place = site.rpartition(".")
    found = input_quantizer(module.get_submodule(layer))
    return place == "input" and found is not None and found.name != site
