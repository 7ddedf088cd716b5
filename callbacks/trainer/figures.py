"""Numbers and figures for whatever logger is on, by the interface that loggers have in common.

Numbers go to all of them, in a row after the last training step. Figures go to those whose ``experiment`` takes
matplotlib's (TensorBoard and its kind: ``add_figure``), or that take images (``log_image``, as W&B's does); the others,
such as CSV files, have the numbers alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info


def step_after_training(trainer: pl.Trainer) -> int:
    """A step that no row of training has: one past the last."""
    return max(trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_scalars(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Log numbers; nothing in a ``fast_dev_run``, which has no loggers."""
    for logger in trainer.loggers:
        if values:
            logger.log_metrics(dict(values), step=step_after_training(trainer))


def log_figure(trainer: pl.Trainer, name: str, draw: Callable[[], Any]) -> None:
    """Log a figure, on the first rank.

    Args:
        trainer: whose loggers get it.
        name: what it is called there.
        draw: makes a figure of matplotlib; called if a logger takes figures.
    """
    if not trainer.is_global_zero:
        return
    step = step_after_training(trainer)
    takers = [one for one in trainer.loggers if _takes_figures(one) or callable(getattr(one, "log_image", None))]
    if not takers:
        return
    try:
        figure = draw()
    except ImportError:
        rank_zero_info(f"{name}: no figure for the logger, matplotlib is not installed")
        return
    for logger in takers:
        if _takes_figures(logger):
            logger.experiment.add_figure(name, figure, global_step=step)  # type: ignore[attr-defined]
        else:
            logger.log_image(key=name, images=[_pixels(figure)], step=step)  # type: ignore[attr-defined]


def _takes_figures(logger: Any) -> bool:
    return callable(getattr(getattr(logger, "experiment", None), "add_figure", None))


def _pixels(figure: Any) -> Any:
    """The figure as an array of pixels, (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
