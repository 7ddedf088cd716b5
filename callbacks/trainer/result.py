"""What came of a fit, in one line: size before and after, mean bits, accuracy that was lost, where files are."""

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lq.attachment.sites import is_attached
from lq.attachment.summary import summary
from lq.callbacks.trainer.checkpoints import model_checkpoints
from lq.tables import amount


def tell_result(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Say it, on the first rank, when all callbacks are done with the network."""
    if trainer.is_global_zero and is_attached(module):
        rank_zero_info(_result(trainer, module))


def _result(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    size = summary(module)
    said = (
        f"Result: {type(module).__name__}, {amount(size.float_bytes, 'B')} → {amount(size.bytes, 'B')}, "
        f"{size.average_bits:.2f} bits per quantized weight"
    )
    accuracy = _accuracy(trainer)
    if accuracy is not None:
        before, after = (100 * part for part in accuracy)
        said += f", accuracy {before:.2f} % → {after:.2f} % ({after - before:+.2f})"
    files = [f"{kind} {path}" for kind, path in _files(trainer).items()]
    return f"{said}; {', '.join(files)}" if files else said


def _accuracy(trainer: pl.Trainer) -> tuple[float, float] | None:
    """Of the float network and of what it has become, if a callback has measured both."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        found = getattr(getattr(callback, "report", None), "accuracy", None)
        if isinstance(found, Mapping) and {"float", "final"} <= found.keys():
            return found["float"], found["final"]
    return None


def _files(trainer: pl.Trainer) -> dict[str, Path]:
    """What was written in this run, by kind; of several of a kind the last."""
    found: dict[str, Path] = {}
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return found
    for one in model_checkpoints(trainer):
        path = one.best_model_path or one.last_model_path
        if path:
            found["checkpoint"] = Path(path)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        written = getattr(callback, "files", None)
        if isinstance(written, dict) and type(callback).__module__.startswith("lq."):
            found |= written
    return found
