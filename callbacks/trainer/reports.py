"""Where callbacks write what they did: beside the Trainer's own logs, as whole files."""

from pathlib import Path

import lightning.pytorch as pl

from lq.files import whole_file


def report_path(trainer: pl.Trainer, name: str, save_to: str | Path | None) -> Path | None:
    """The file to write on this rank: `save_to`, or `name` in the Trainer's log folder; None: none.

    Nothing is written by other ranks than the first, in a ``fast_dev_run``, or where the Trainer keeps nothing (neither
    a logger nor checkpoints) and no path was given. To be called on every rank: the log folder is agreed on.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    keeps = bool(save_to or trainer.loggers or trainer.checkpoint_callback)
    if not trainer.is_global_zero or not keeps or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    path = Path(folder) / name if save_to is None else Path(save_to)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
