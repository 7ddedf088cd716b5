"""Reconstruct after calibration, or at the end of training: fit the quantized network to the float one, unit by unit.

It runs in ``on_fit_start``, after `Quantize` (and `AllocateBits`, `SynthesizeData`), or in ``on_train_end``; with
``Trainer(max_epochs=0)`` it is all that happens, and the network is quantized without training. Finished units can be
kept in a file, from which a run that was killed goes on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from lq.attachment.float_models import float_copy
from lq.attachment.sites import require_attached
from lq.calibration.calibration import needs_calibration
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.data import forward_of, progress_bar, reduce_over, training_batches
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.reports import report_path, write_text
from lq.errors import SpecError, StateError
from lq.reconstruction import Reconstruction, reconstruct
from lq.reconstruction.drop import Drop, drop_of
from lq.reconstruction.granularity import Metric
from lq.reconstruction.losses import Loss, loss_of
from lq.reconstruction.method import Activations, Start
from lq.reconstruction.reconstruct import Units, check_choices, without_address
from lq.reconstruction.rounding import Rounding, rounding_of
from lq.reconstruction.storage import dtype_of, memory_in_bytes
from lq.structure.forward import Forward

When = Literal["start", "end"]


class Reconstruct(ModuleCallback):
    """Learn how weights are rounded, and the steps of activations, by the outputs of layers, blocks or the network.

    Put it after `Quantize`. AdaRound, BRECQ, QDrop, MRECG and NWQ are choices of its arguments (see `lq.reconstruct`),
    and recipes of these names.

    Args:
        units: "layer", "block", "mixed" (MRECG), "network", or names of modules, chains of them as lists.
        rounding: "nearest", "adaround", "softmax" (NWQ), "wide_softmax" (also one level down: where weights are
            levels already), or a rounding object of `lq.reconstruction.rounding`.
        loss: "relative" (the squared error, of tokens relative to the variance of each), "mse", "fisher" (BRECQ), "kl"
            (the network as one unit), or a function of output, target and weights.
        drop: probability that an element of an activation stays float: a number, "annealed" (NWQ), or a function of
            progress.
        iterations: optimizer steps for a unit.
        start: where the rounding starts: at the "float" weights, or nearer to what error "feedback" (GPTQ) chooses.
        batch_size: samples in a step, over all ranks.
        activation_mode: while rounding is learned, activations are quantized by steps that are "learned" along or by
            the steps they have ("quantized"), or left "float"; they are quantized in the end.
        step_lr: learning rate of the logarithm of activation steps; None: by the number of iterations.
        regularization: weight of the squared differences of block outputs inside of a unit (NWQ).
        bias_lr: learning rate of the layers' biases; 0: they stay.
        metric: what mixed units are chosen by: "modcap" (without data) or "loss" (a short reconstruction).
        merges: pairs of blocks that mixed units merge.
        search_iterations: steps for a block of that short reconstruction.
        early_stop: end a unit when its loss falls no further and the rounding is decided.
        compile: run units through ``torch.compile`` (see `lq.reconstruct`).
        samples: training samples to reconstruct on, over all ranks.
        when: "start" of fitting, or "end" of training; checkpoints that are saved during training are from before.
        memory: limit for captured activations on the device, and once more in host memory; the rest goes to files.
        dtype: what captured activations are kept as, such as "float16"; None: as they are.
        seed: of the order of samples and of drops.
        resume: file that keeps finished units; a run that finds it goes on after the last of them. A second callback in
            the list adds "-2" to the name.
        save_to: path of the JSON file to write; by default ``reconstruction.json`` in the Trainer's log folder, if the
            Trainer keeps anything (a logger, checkpoints). With matplotlib, a plot goes beside it.
        forward: called with the module and a batch; by default as for `Quantize`.

    Afterwards ``reconstruction`` tells what was done.

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(4, 4, skip=True), Reconstruct()]).fit(module, datamodule)
    """

    def __init__(
        self,
        units: Units = "block",
        rounding: str | Rounding = "adaround",
        loss: str | Loss = "relative",
        drop: float | str | Drop = 0.5,
        iterations: int = 20_000,
        *,
        start: Start = "float",
        batch_size: int = 32,
        activation_mode: Activations = "learned",
        step_lr: float | None = None,
        regularization: float = 0.0,
        bias_lr: float = 0.0,
        metric: Metric = "modcap",
        merges: int = 2,
        search_iterations: int = 200,
        early_stop: bool = False,
        compile: bool = False,
        samples: int = 1024,
        when: When = "start",
        memory: str | float = "4GB",
        dtype: str | None = None,
        seed: int = 0,
        resume: str | Path | None = None,
        save_to: str | Path | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        rounding_of(rounding)  # wrong arguments fail here, not after the data are loaded
        loss_of(loss)
        drop_of(drop)
        memory_in_bytes(memory)
        dtype_of(dtype)
        check_choices(
            units=units,
            metric=metric,
            activation_mode=activation_mode,
            start=start,
            step_lr=step_lr,
            bias_lr=bias_lr,
            regularization=regularization,
            iterations=iterations,
            batch_size=batch_size,
            merges=merges,
            search_iterations=search_iterations,
            samples=samples,
        )
        if when not in get_args(When):
            raise SpecError(f"when={when!r} is unknown; use one of {get_args(When)}")
        self.units = units
        self.rounding = rounding
        self.loss = loss
        self.drop = drop
        self.iterations = iterations
        self.start: Start = start
        self.batch_size = batch_size
        self.activation_mode: Activations = activation_mode
        self.step_lr = step_lr
        self.regularization = regularization
        self.bias_lr = bias_lr
        self.metric: Metric = metric
        self.merges = merges
        self.search_iterations = search_iterations
        self.early_stop = early_stop
        self.compile = compile
        self.samples = samples
        self.when: When = when
        self.memory = memory
        self.dtype = dtype
        self.seed = seed
        self.resume = resume
        self.save_to = save_to
        self.forward = forward

    @override
    def _begin(self) -> None:
        self.reconstruction: Reconstruction | None = None
        self._teacher: nn.Module | None = None

    @property
    @override
    def state_key(self) -> str:
        """Two of them in one run have states of their own, if they do different things."""
        return self._generate_state_key(
            units=self.units,
            rounding=without_address(self.rounding),
            loss=without_address(self.loss),
            drop=without_address(self.drop),
            activation_mode=self.activation_mode,
            initial=(self.start, self.metric, self.bias_lr),
            when=self.when,
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reconstruct before training; nothing if a checkpoint brought what came of it."""
        require_attached(pl_module, "Reconstruct")
        if self.when == "start" or trainer.max_epochs == 0:  # then training has no end
            self._reconstruct(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reconstruct what training has left."""
        if self.when == "end":
            self._reconstruct(trainer, pl_module)
            self.changed_after_training = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the float network; what is done at the end is about to be done to other weights."""
        self._teacher = None
        if self.when == "end":
            self.reconstruction = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the float network."""
        super().teardown(trainer, pl_module, stage)
        self._teacher = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was done, as JSON."""
        return {"reconstruction": None if self.reconstruction is None else self.reconstruction.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was done; weights and steps are in the module's own state."""
        super().load_state_dict(state_dict)
        saved = state_dict["reconstruction"]
        self.reconstruction = None if saved is None else Reconstruction.from_json(saved)

    def _reconstruct(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.reconstruction is not None:
            return
        if needs_calibration(module):
            raise StateError(
                "Reconstruct needs calibrated quantizers; list Quantize before it in Trainer(callbacks=[...])"
            )
        fast = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        before = self._before(trainer)
        self._teacher = next((other._teacher for other in before if other._teacher is not None), None)
        if self._teacher is None:
            self._teacher = _float_copy(module)
        with isolate_rng():
            self.reconstruction = reconstruct(
                module,
                training_batches(trainer, self.samples, "Reading samples"),
                units=self.units,
                rounding=self.rounding,
                start=self.start,
                loss=self.loss,
                drop=self.drop,
                iterations=1 if fast else self.iterations,
                batch_size=self.batch_size,
                activation_mode=self.activation_mode,
                step_lr=self.step_lr,
                regularization=self.regularization,
                bias_lr=self.bias_lr,
                metric=self.metric,
                merges=self.merges,
                search_iterations=1 if fast else self.search_iterations,
                early_stop=self.early_stop,
                compile=self.compile,
                memory=self.memory,
                dtype=dtype_of(self.dtype),
                seed=self.seed,
                resume=None if fast else self._file(len(before)),
                teacher=self._teacher,
                forward=forward_of(trainer, module, self.forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
                ranks=trainer.world_size,
                rank=trainer.global_rank,
                watch=lambda steps, name: _shown(trainer, steps, name),
            )
        give_to_averages(trainer, module, weights=True)
        self._report(trainer, self.reconstruction, len(before))

    def _before(self, trainer: pl.Trainer) -> list["Reconstruct"]:
        """Those that reconstruct the same weights before this one: their float network is the original one."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = [callback for callback in callbacks if isinstance(callback, Reconstruct)]
        if trainer.max_epochs != 0:  # else all of them run at the start
            ours = [callback for callback in ours if callback.when == self.when]
        return ours[: ours.index(self)]

    def _file(self, before: int) -> Path | None:
        """The file of finished units, one for each of several callbacks."""
        if self.resume is None:
            return None
        return _numbered(Path(self.resume), before)

    def _report(self, trainer: pl.Trainer, found: Reconstruction, before: int) -> None:
        """Show, log and save what was done."""
        rank_zero_info(f"Reconstructed: {'; '.join(found.table().notes)}")
        name = f"reconstruction-{before + 1}" if before else "reconstruction"
        for index, unit in enumerate(found.units):
            values = {
                f"{name}/loss_before": unit.before,
                f"{name}/loss_after": unit.after,
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=index)
        path = report_path(trainer, "reconstruction.json", self.save_to)
        if path is not None:
            path = _numbered(path, before)
            write_text(path, found.to_json())
            try:
                found.plot(path.with_suffix(".png"))
            except ImportError:
                rank_zero_info("Reconstruct: no plot, matplotlib is not installed")


def _numbered(path: Path, before: int) -> Path:
    """The path for the callback that has some of its kind before it."""
    return path.with_name(f"{path.stem}-{before + 1}{path.suffix}") if before else path


def _float_copy(module: pl.LightningModule) -> nn.Module:
    attached, module._trainer = module._trainer, None  # a copy of the module must not copy the Trainer
    try:
        return float_copy(module)
    finally:
        module._trainer = attached


def _shown(trainer: pl.Trainer, steps: Iterable[int], name: str) -> Iterable[int]:
    return progress_bar(trainer, steps, f"Reconstructing {name}", unit="step")
