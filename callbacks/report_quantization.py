"""Write what was done to a network as one HTML page and as JSON, when fit is over.

It measures accuracy before and after on validation batches, if these have classes, and notes what moves while training:
learning rates, steps and widths of quantizers, codes that change, what validation logs. Everything else it takes from
the callbacks beside it: what `AllocateBits`, `Reconstruct`, `OptimizeRanges`, `CompareToFloat` and `ExportModel` found.
The page is `lq.report.html`'s.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lq.attachment.float_models import float_model
from lq.attachment.sites import require_attached
from lq.callbacks.trainer.data import forward_of, reduce_over
from lq.callbacks.trainer.evaluation import accuracy_of
from lq.callbacks.trainer.figures import log_figure, log_scalars
from lq.callbacks.trainer.gathering import gather
from lq.callbacks.trainer.noting import Notes
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.report_figures import figures_of
from lq.callbacks.trainer.reports import report_path
from lq.errors import SpecError
from lq.report.html import History, Report, write_report
from lq.structure.forward import Forward


class ReportQuantization(ModuleCallback):
    """Write a page about the quantized network, ``quantization.html``, and ``quantization.json`` beside it.

    It may stand anywhere in the list: it writes when all other callbacks are done.

    Args:
        samples: validation samples that accuracy is measured on, over all ranks; 0: it is not.
        every: steps between two notes of what moves in training; None: the Trainer's ``log_every_n_steps``. Of more
            than 200 notes, every second one is kept.
        save_to: path of the HTML file to write; by default ``quantization.html`` in the Trainer's log folder, if the
            Trainer keeps anything (a logger, checkpoints).
        forward: called with the module and a batch, returns the scores of classes; by default as for `Quantize`.

    Afterwards ``report`` is what was written, a `lq.report.html.Report`.

    Example::

        callbacks = [Quantize(4, 4), AllocateBits("8x"), FineTune(), CompareToFloat(), ReportQuantization()]
    """

    def __init__(
        self,
        samples: int = 1024,
        every: int | None = None,
        *,
        save_to: str | Path | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if samples < 0:
            raise SpecError(f"samples={samples}; give the number of validation samples, or 0 to measure no accuracy")
        if every is not None and every < 1:
            raise SpecError(f"every={every}; notes are at least 1 step apart")
        self.samples = samples
        self.every = every
        self.save_to = save_to
        self.forward = forward

    @override
    def _begin(self) -> None:
        self.report: Report | None = None
        self._accuracy: dict[str, float] = {}
        self._measured_on = 0
        self._notes = Notes()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go to the end of the list, so that all others are done when the page is written."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if callbacks[-1] is not self:  # a new list: the old one is being gone through
            trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the float network, unless a checkpoint brought what it gave."""
        require_attached(pl_module, "ReportQuantization")
        if "float" not in self._accuracy:
            with float_model(pl_module):
                self._measure(trainer, pl_module, "float")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the quantized network before it is trained."""
        if "calibrated" not in self._accuracy:
            self._measure(trainer, pl_module, "calibrated")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what moves, once in a while."""
        self._notes.step(trainer, pl_module, self.every or trainer.log_every_n_steps or 50)  # type: ignore[attr-defined]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what validation has logged."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._notes.metrics(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, gather, log and write."""
        self._measure(trainer, pl_module, "final")
        values = {f"report/{name}_accuracy": value for name, value in self._accuracy.items()}
        report = gather(trainer, pl_module, self._notes.history)
        report.accuracy, report.accuracy_samples = self._accuracy or None, self._measured_on
        self.report = report
        if report.summary is not None:
            values |= {
                "report/bytes": float(report.summary["bytes"]),
                "report/average_bits": float(report.summary["average_bits"]),
            }
        log_scalars(trainer, values)
        for name, draw in figures_of(report).items():
            log_figure(trainer, f"report/{name}", draw)
        path = report_path(trainer, "quantization.html", self.save_to)
        if path is not None:
            write_report(report, path)
            self.files["report"] = path

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was measured and noted so far."""
        history = {name: value for name, value in asdict(self._notes.history).items() if value}
        return {"accuracy": dict(self._accuracy), "samples": self._measured_on, "history": history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        self._accuracy, self._measured_on = dict(state_dict["accuracy"]), state_dict["samples"]
        self._notes = Notes(History(**state_dict["history"]))

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
        if not self.samples:
            return
        found = accuracy_of(
            trainer,
            module,
            self.samples,
            lambda: forward_of(trainer, module, self.forward),
            reduce_over(trainer) if trainer.world_size > 1 else None,
        )
        if found is not None:
            self._accuracy[name], self._measured_on = found
