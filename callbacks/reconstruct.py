"""Reconstruct after calibration, or at the end of training: fit the quantized network to the float one, unit by unit.

It runs in ``on_fit_start``, after `Quantize` (and `AllocateBits`, `SynthesizeData`), or in ``on_train_end``; with
``Trainer(max_epochs=0)`` it is all that happens, and the network is quantized without training. Finished units can be
kept in a file, from which a run that was killed goes on.
"""

import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from lq.attachment.float_models import float_copy
from lq.attachment.sites import require_attached
from lq.calibration.calibration import needs_calibration
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.callbacks.trainer.figures import log_figure
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.reports import report_path, write_text
from lq.errors import StateError
from lq.options import after, takes
from lq.reconstruction import Reconstruction, reconstruct
from lq.reconstruction.options import AT_LEAST_1, Options
from lq.structure.forward import Forward

When = Literal["start", "end"]


@dataclass(frozen=True)
class CallbackOptions(Options):
    """Options of `lq.reconstruct`, and those that the callback alone has.

    Args:
        samples: training samples to reconstruct on, over all ranks.
        when: "start" of fitting, or "end" of training; checkpoints that are saved during training are from before.
        save_to: path of the JSON file to write; by default ``reconstruction.json`` in the Trainer's log folder, if the
            Trainer keeps anything (a logger, checkpoints). With matplotlib, a plot goes beside it.
        forward: called with the module and a batch; by default as for `Quantize`.
    """

    _: KW_ONLY
    dtype: str | None = None  # as files and command lines have it
    samples: int = field(default=1024, metadata={**AT_LEAST_1, **after("compile")})
    when: When = field(default="start", metadata=after("samples"))
    save_to: str | Path | None = None
    forward: Forward | None = None


class Reconstruct(ModuleCallback):
    """Learn how weights are rounded, and the steps of activations, by the outputs of layers, blocks or the network.

    Put it after `Quantize`. AdaRound, BRECQ, QDrop, MRECG and NWQ are choices of its arguments (see `lq.reconstruct`),
    and recipes of these names. Afterwards ``reconstruction`` tells what was done. Of several in a list of callbacks,
    the second adds "-2" to the names of its files, and so on.

    Args:
        options: each of `CallbackOptions` is an argument, and an attribute.

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(4, 4, skip=True), Reconstruct()]).fit(module, datamodule)
    """

    @takes(CallbackOptions)
    def __init__(self, options: CallbackOptions) -> None:
        super().__init__()
        self.options = options

    if TYPE_CHECKING:  # options are attributes, which may be set

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

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
            rounding=_without_address(self.rounding),
            loss=_without_address(self.loss),
            drop=_without_address(self.drop),
            activation_mode=self.activation_mode,
            initial=(self.start, self.metric, self.bias_lr),
            when=self.when,
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reconstruct before training; nothing if a checkpoint brought what came of it."""
        require_attached(pl_module, "Reconstruct")
        if self.options.when == "start" or trainer.max_epochs == 0:  # then training has no end
            self._reconstruct(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reconstruct what training has left."""
        if self.options.when == "end":
            self._reconstruct(trainer, pl_module)
            self.changed_after_training = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the float network; what is done at the end is about to be done to other weights."""
        self._teacher = None
        if self.options.when == "end":
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
        earlier = self._earlier(trainer)
        self._teacher = next((other._teacher for other in earlier if other._teacher is not None), None)
        if self._teacher is None:
            self._teacher = _float_copy(module)
        options = self.options.shared()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            options |= {"iterations": 1, "search_iterations": 1, "resume": None}
        elif self.resume is not None:
            options["resume"] = _numbered(Path(self.resume), len(earlier))
        with isolate_rng(), progress_of(trainer):
            self.reconstruction = reconstruct(
                module,
                training_batches(trainer, self.samples, "Reading samples"),
                **options,
                teacher=self._teacher,
                forward=forward_of(trainer, module, self.forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
                ranks=trainer.world_size,
                rank=trainer.global_rank,
            )
        give_to_averages(trainer, module, weights=True)
        self._report(trainer, self.reconstruction, len(earlier))

    def _earlier(self, trainer: pl.Trainer) -> list["Reconstruct"]:
        """Those that reconstruct the same weights before this one: their float network is the original one."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = [callback for callback in callbacks if isinstance(callback, Reconstruct)]
        if trainer.max_epochs != 0:  # else all of them run at the start
            ours = [callback for callback in ours if callback.when == self.when]
        return ours[: ours.index(self)]

    def _report(self, trainer: pl.Trainer, reconstruction: Reconstruction, earlier: int) -> None:
        """Show, log and save what was done."""
        rank_zero_info(f"Reconstructed: {'; '.join(reconstruction.table().notes)}")
        name = f"reconstruction-{earlier + 1}" if earlier else "reconstruction"
        for part in ("before", "after"):
            losses = [float(getattr(unit, part)) for unit in reconstruction.units]
            self.numbers[f"{name}/loss_{part}"] = sum(losses) / max(len(losses), 1)
        log_figure(trainer, name, reconstruction.figure)
        path = report_path(trainer, "reconstruction.json", self.save_to)
        if path is not None:
            path = _numbered(path, earlier)
            write_text(path, reconstruction.to_json())
            try:
                reconstruction.plot(path.with_suffix(".png"))
            except ImportError:
                rank_zero_info("Reconstruct: no plot, matplotlib is not installed")


def _numbered(path: Path, earlier: int) -> Path:
    """The path for the callback that has some of its kind before it in the list."""
    return path.with_name(f"{path.stem}-{earlier + 1}{path.suffix}") if earlier else path


def _without_address(thing: object) -> str:
    """What an object is, the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(thing))


def _float_copy(module: pl.LightningModule) -> nn.Module:
    attached, module._trainer = module._trainer, None  # a copy of the module must not copy the Trainer
    try:
        return float_copy(module)
    finally:
        module._trainer = attached
