"""Compare the quantized network with the float one when fit is over: which layers lose, and what to try next.

It runs in ``on_fit_end``, on training batches, whatever brought the network there: calibration, reconstruction,
training (`lq.report.comparison`). What it found is in the callback's state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lq.attachment.float_view import as_float
from lq.attachment.sites import quantizers, require_attached
from lq.callbacks.reconstruct import Reconstruct
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.callbacks.trainer.figures import log_figure, log_scalars
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.reports import report_path, write_text
from lq.errors import SpecError
from lq.reconstruction.storage import memory_in_bytes
from lq.report.comparison import Comparison, compare, float_reference
from lq.structure.forward import Forward

Weights = Literal["auto", "start", "end"]


class CompareToFloat(ModuleCallback):
    """Compare every layer with its float twin, alone and with all before it quantized; the worst first.

    Put it after `Quantize`, and after what changes the network when training ends.

    Args:
        samples: training samples to compare on, over all ranks.
        weights: those of the float network: what the module had when fit started ("start"), or has in the end ("end").
            "auto": those of the start if the Trainer trains nothing (a reconstruction leaves weights that are levels
            already), those of the end after training.
        memory: limit for the float outputs of one batch; of those that do not fit, evenly spaced values are compared.
        save_to: path of the CSV file to write; by default ``comparison.csv`` in the Trainer's log folder, if the
            Trainer keeps anything (a logger, checkpoints). A JSON file and, with matplotlib, a plot go beside it.
        forward: called with the module and a batch; by default as for `Quantize`.

    Afterwards ``comparison`` is what was found, a `lq.Comparison`.

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(4, 4), CompareToFloat()]).fit(module, datamodule)
    """

    def __init__(
        self,
        samples: int = 64,
        weights: Weights = "auto",
        *,
        memory: str | float = "1GB",
        save_to: str | Path | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if samples < 1:
            raise SpecError(f"samples={samples}; a comparison needs at least 1")
        if weights not in get_args(Weights):
            raise SpecError(f"weights={weights!r} is unknown; use one of {get_args(Weights)}")
        memory_in_bytes(memory)
        self.samples = samples
        self.weights: Weights = weights
        self.memory = memory
        self.save_to = save_to
        self.forward = forward

    @override
    def _begin(self) -> None:
        self.comparison: Comparison | None = None
        self._start: dict[str, Tensor] | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the float weights, if those are what is compared with."""
        require_attached(pl_module, "CompareToFloat")
        trains = trainer.max_epochs != 0 and trainer.max_steps != 0
        self._start = None
        if self.weights == "start" or (self.weights == "auto" and not trains):
            self._start = _float_weights(_before_reconstruction(trainer) or pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, show, log and save."""
        with isolate_rng(), progress_of(trainer):
            self.comparison = compare(
                pl_module,
                training_batches(trainer, self.samples, "Comparing"),
                reference=None if self._start is None else _reference(pl_module, self._start),
                forward=forward_of(trainer, pl_module, self.forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
                memory=self.memory,
            )
        self._start = None
        self._report(trainer, self.comparison)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the float weights."""
        super().teardown(trainer, pl_module, stage)
        self._start = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was found, as JSON."""
        return {"comparison": None if self.comparison is None else self.comparison.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        saved = state_dict["comparison"]
        self.comparison = None if saved is None else Comparison.from_json(saved)

    def _report(self, trainer: pl.Trainer, found: Comparison) -> None:
        rank_zero_info(f"Compared with the float network:\n{found.table(10)}")
        values = {}
        if found.network is not None:
            values["comparison/network_sqnr"] = found.network.sqnr
        worst = found.layers[0].alone if found.layers else None
        if worst is not None:
            values["comparison/worst_layer_sqnr"] = worst.sqnr
        log_scalars(trainer, values)
        if found.layers:
            log_figure(trainer, "comparison", found.figure)
        path = report_path(trainer, "comparison.csv", self.save_to)
        if path is not None:
            found.to_csv(path)
            write_text(path.with_suffix(".json"), found.to_json())
            try:
                found.plot(path.with_suffix(".png"))
            except ImportError:
                rank_zero_info("CompareToFloat: no plot, matplotlib is not installed")


def _before_reconstruction(trainer: pl.Trainer) -> nn.Module | None:
    """The float network that a `Reconstruct` before this callback has kept."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept = (one._teacher for one in callbacks if isinstance(one, Reconstruct))
    return next((teacher for teacher in kept if teacher is not None), None)


def _float_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all that is not a quantizer's, by the names of the float module, in host memory."""
    ours = {id(t) for q in quantizers(module) for t in [*q.parameters(), *q.buffers()]}
    with as_float(module):
        everything = [*module.named_parameters(), *module.named_buffers()]
        return {name: t.detach().to("cpu", copy=True) for name, t in everything if id(t) not in ours}


def _reference(module: pl.LightningModule, weights: Mapping[str, Tensor]) -> nn.Module:
    attached, module._trainer = module._trainer, None  # a copy of the module must not copy the Trainer
    try:
        return float_reference(module, weights)
    finally:
        module._trainer = attached
