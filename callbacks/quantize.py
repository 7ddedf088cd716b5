"""Attach quantizers when the Trainer sets up, calibrate them when fitting starts.

Attaching happens in ``setup``, for every stage: what is attached there is present when checkpoints are restored, when
DDP wraps the model and when optimizers are built. What there is to quantize is found by running the module once
(`lq.inspect`) on its ``example_input_array`` or on two samples of the stage's data. Layers that the module builds in
its own ``setup`` or in ``configure_model`` come later, but before all that: there, attaching follows
``configure_model``. Calibration needs data, device and ranks, so it runs in ``on_fit_start``; a resumed run has its
ranges from the checkpoint and skips it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lq.attach import attach, attached_plan
from lq.calibration import Forward, needs_calibration
from lq.callbacks.checkpoints import class_names, save_result
from lq.callbacks.data import calibrate_on_training_data, first_batch, forward_of
from lq.callbacks.per_module import ModuleCallback
from lq.checkpoint import planned_by, rebuild
from lq.errors import DataError, SpecError, StateError
from lq.final_widths import warn_if_unfinished
from lq.folding import fold_batchnorm
from lq.inspection import inspect
from lq.report import summary
from lq.scheme import Override, Skip, plan_sites
from lq.sites import common_module, input_quantizer, is_attached, layers
from lq.spec import QuantSpec
from lq.structure import Structure

_COPYING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_FINDERS = {"LearningRateFinder", "BatchSizeFinder"}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


class Quantize(ModuleCallback):
    """Quantize the layers of a LightningModule: fold BatchNorms, attach quantizers, calibrate on training data.

    With ``Trainer(max_epochs=0)`` this is post-training quantization; with epochs, the start of fine-tuning.

    Args:
        weights: width in bits (0..8, 16), a `QuantSpec`, or None to leave weights in float.
        activations: the same for the input of each quantized layer and for the operands of attention.
        structure: a `Structure`, or the path of one saved as JSON, instead of running the module once; its names may
            start at a submodule.
        skip: also quantize the tensors on skip paths (see `lq.attach`).
        share_concats: one range for all parts of a concatenation.
        integer: also quantize, to 8 bits, what engines need that compute in integers (see `lq.attach`).
        symmetric: zero is the middle level of every weight's grid; False gives each channel a zero point of its own.
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
        structure: Structure | str | Path | None = None,
        skip: Skip = False,
        share_concats: bool = False,
        integer: bool = False,
        symmetric: bool = True,
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

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fold and attach, once."""
        super().setup(trainer, pl_module, stage)
        _check_strategy(trainer)
        _put_finders_last(trainer)
        if is_attached(pl_module):
            self._check_same(pl_module)
            return
        self._check_order(trainer)
        if is_overridden("configure_model", pl_module) or not any(layers(pl_module)):
            self._attach_after_configuring(trainer, pl_module)
        else:
            self._attach(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate on training data, unless a checkpoint brought the ranges."""
        if not needs_calibration(pl_module):
            return
        calibrate_on_training_data(trainer, pl_module, self.calibration_samples, self.forward)
        rank_zero_info(f"Quantized {type(pl_module).__name__}: {summary(pl_module).total()}")

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
        """Say so if the network has more bits than were asked for."""
        if trainer.state.fn == "validate":
            warn_if_unfinished(pl_module, f"{type(pl_module).__name__}, which is evaluated,")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the network has more bits than were asked for."""
        warn_if_unfinished(pl_module, f"{type(pl_module).__name__}, which is evaluated,")

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the network has more bits than were asked for."""
        warn_if_unfinished(pl_module, f"{type(pl_module).__name__}, which predicts,")

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.fold_bn:
            fold_batchnorm(module)
        self._found = self._structure(trainer, module)
        flow: dict[str, Any] = self._flow if self._found is not None else {}
        attach(module, self.weights, self.activations, structure=self._found, **flow, **self._choice)

    def _attach_after_configuring(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Attach when ``configure_model``, which may build the layers, has run."""
        configure = module.configure_model

        def configure_model() -> None:
            del module.__dict__["configure_model"]
            configure()
            if not is_attached(module):
                self._attach(trainer, module)

        module.configure_model = configure_model  # type: ignore[method-assign]

    def _structure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Structure | None:
        """The structure given, or found by running the module; None if it could not be run."""
        if self.structure is not None:
            given = self.structure
            found = given if isinstance(given, Structure) else Structure.from_json(Path(given).read_text())
            missing = {site.module for site in found.sites} - dict(module.named_modules()).keys()
            return found.under(common_module(module)[0]) if missing else found
        example = module.example_input_array
        try:
            if example is not None:
                return inspect(module, example, forward=_call_with)
            batch = first_batch(trainer, module)
            if batch is None and not any(self._flow.values()):
                _rebuild_from_checkpoint(module)
                rank_zero_info(
                    f"Quantize: neither example_input_array nor data to look at {type(module).__name__} with; its "
                    "layers are quantized by their class, or as the checkpoint has it"
                )
                return None
            return inspect(module, batch, forward=forward_of(trainer, module, self.forward))
        except DataError as error:
            if any(self._flow.values()):
                raise
            rank_zero_warn(
                f"{type(module).__name__} could not be looked at: {error}. Its layers are quantized by their class; "
                "attention and other functional calls stay float. Set example_input_array, or pass forward= or "
                "structure= to Quantize"
            )
            _rebuild_from_checkpoint(module)
            return None

    def _check_same(self, module: pl.LightningModule) -> None:
        """Raise if the module was quantized otherwise than this callback says."""
        present = attached_plan(module)
        if present is None:
            return  # quantizers built from a checkpoint
        flow: dict[str, Any] = self._flow if self._found is not None else {}
        planned = plan_sites(module, self.weights, self.activations, structure=self._found, **flow, **self._choice)
        wanted = {name: found.spec for name, found in planned.items() if found.owner is None}
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


def _check_strategy(trainer: pl.Trainer) -> None:
    """Raise if the Trainer's strategy would split weights over devices: a part of a channel has no range."""
    if _SHARDING & class_names(trainer.strategy):
        raise StateError(
            f"Quantize does not work with {type(trainer.strategy).__name__}, which shards the weights that it rounds; "
            "use Trainer(strategy='ddp') or a single device"
        )


def _put_finders_last(trainer: pl.Trainer) -> None:
    """Have the searches for a learning rate or a batch size run after lq's callbacks have calibrated.

    They train in ``on_fit_start``, and Lightning (its Tuner too) puts them first. The list is replaced, not changed:
    the Trainer is iterating over it.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    end = 1 + max((i for i, callback in enumerate(callbacks) if _is_ours(callback)), default=-1)
    finders = [callback for callback in callbacks[:end] if _FINDERS & class_names(callback)]
    if finders:
        others = [callback for callback in callbacks[:end] if callback not in finders]
        trainer.callbacks = [*others, *finders, *callbacks[end:]]  # type: ignore[attr-defined]


def _is_ours(callback: pl.Callback) -> bool:
    """Whether it is one of lq's callbacks, or a subclass."""
    return any(base.__module__.startswith("lq.callbacks.") for base in type(callback).__mro__)


def _call_with(model: torch.nn.Module, example: Any) -> Any:
    """Run a module on its ``example_input_array``, as Lightning does."""
    if type(model).forward is pl.LightningModule.forward:
        model = common_module(model)[1]
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _shares(module: torch.nn.Module, site: str) -> bool:
    """Whether the input of a layer is quantized by the quantizer of another."""
    layer, _, place = site.rpartition(".")
    found = input_quantizer(module.get_submodule(layer))
    return place == "input" and found is not None and found.name != site


def _rebuild_from_checkpoint(module: pl.LightningModule) -> None:
    """Have the module build the quantizers that a checkpoint has and it has not, when it is restored."""
    restore = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        if planned_by(checkpoint["state_dict"]):
            rebuild(module, checkpoint["state_dict"])
        restore(checkpoint)

    module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]
