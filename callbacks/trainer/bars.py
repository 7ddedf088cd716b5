"""Bars for what lq does in a Trainer (`lq.bars`), in the style of the Trainer's own: rich or tqdm, or none at all.

The first rank shows them, if the Trainer has a progress bar that is on. A rich bar needs a terminal that can redraw
lines; elsewhere tqdm's are shown.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lq.bars import Bar, Display, TqdmDisplay, shown_by


@contextmanager
def progress_of(trainer: pl.Trainer) -> Iterator[None]:
    """Have the long work inside shown as the Trainer shows its own."""
    with shown_by(_display_of(trainer)):
        yield


def _display_of(trainer: pl.Trainer) -> Display | None:
    own = trainer.progress_bar_callback
    if own is None or not getattr(own, "is_enabled", True) or not trainer.is_global_zero:
        return None
    if isinstance(own, RichProgressBar):
        from rich.console import Console

        console = own._console or Console(**own._console_kwargs)
        if console.is_terminal and not console.is_dumb_terminal:
            return RichDisplay(own, console)
    return TqdmDisplay(sys.stdout, rank_zero_info)


class RichDisplay:
    """Bars of rich, with the theme of the Trainer's; beside its own while that is shown.

    Args:
        own: the Trainer's progress bar.
        console: where to.
    """

    interval = 0.2

    def __init__(self, own: RichProgressBar, console: Any) -> None:
        self.own = own
        self.console = console
        self._open: list[_RichBar] = []

    def open(self) -> Bar:
        """A new bar."""
        self._open.append(_RichBar(self))
        return self._open[-1]

    def closed(self, bar: "_RichBar") -> None:
        """A bar is gone."""
        self._open.remove(bar)

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        own = [bar.progress for bar in self._open if not bar.lent]
        for progress in own:
            progress.stop()
        rank_zero_info(text)
        for progress in own:
            progress.start()


class _RichBar:
    def __init__(self, display: RichDisplay) -> None:
        self.display = display
        running: Any = display.own.progress
        self.lent = running is not None and running.live.is_started
        self.progress: Any = running if self.lent else self._new()
        self.begun = time.monotonic()
        self.task = self.progress.add_task("", total=100, visible=False, clock="")
        if not self.lent:
            self.progress.start()

    def _new(self) -> Any:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        theme = self.display.own.theme
        return Progress(
            TextColumn("{task.description}", style=theme.description),
            BarColumn(
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            TaskProgressColumn(style=theme.batch_progress),
            TextColumn("{task.fields[clock]}", style=theme.time),
            console=self.display.console,
            transient=True,
            auto_refresh=False,  # a thread that draws would take its time from the work
        )

    def show(self, text: str, share: float | None) -> None:
        """Show it."""
        taken = time.monotonic() - self.begun
        clock = _clock(taken)
        if share:
            clock += f" • {_clock(taken / share * (1 - share))}"
        done, total = int(100 * (share or 0.0)), 100 if share is not None or self.lent else None
        self.progress.update(self.task, description=text, completed=done, total=total, clock=clock, visible=True)
        self.progress.refresh()

    def close(self) -> None:
        """Take it away."""
        if self.lent:  # hidden, not removed: Lightning 2.6.0 takes the number of a task for its place among all
            self.progress.update(self.task, visible=False)
        else:
            self.progress.remove_task(self.task)
            self.progress.stop()
        self.display.closed(self)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"
