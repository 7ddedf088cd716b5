"""Bars for long work: loops say how far they are; whoever runs them decides whether, and how, that is shown.

By default nothing is shown, and loops run as if they were not watched. Within `show_progress`, or `shown_by` a display
of one's own (the callbacks give the Trainer's style), each stage has one bar: which item of how many, the share that is
done, the time taken and the time left. Work that will take more than two minutes is told of in one line, by the speed
that was measured once it ran steadily.

A loop wraps what it goes through in `steps`; what one item is made of (the iterations of a unit) in `parts`, which
moves the same bar. Work of a few different parts is a `stage`, which names them with `at`. No step waits for a device:
what is shown is what has been asked of it.
"""

import functools
import operator
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import IO, Any, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

# Work that takes as many seconds is told of before.
_LONG = 120.0
# The speed is measured over as many parts, or items, and seconds; without the first parts, which are slower.
_PARTS, _WARM_UP, _ITEMS, _SECONDS = 20, 3, 2, 1.0


class Bar(Protocol):
    """One bar on a display."""

    def show(self, text: str, share: float | None) -> None:
        """Show what is being done, and the share of all that is done; None: nobody knows."""

    def close(self) -> None:
        """Take the bar away."""


class Display(Protocol):
    """What bars are shown on.

    Args:
        interval: least seconds between two changes of a bar.
    """

    interval: float

    def open(self) -> Bar:
        """A new bar."""

    def say(self, text: str) -> None:
        """Show a line that stays."""


@dataclass(frozen=True)
class _Screen:
    """A display, and the stages that are open on it."""

    display: Display
    stages: list["_Stage"]


_screen: ContextVar[_Screen | None] = ContextVar("lq_screen", default=None)


@contextmanager
def shown_by(display: Display | None) -> Iterator[None]:
    """Have the long work inside shown by a display; None: not at all."""
    token = _screen.set(None if display is None else _Screen(display, []))
    try:
        yield
    finally:
        _screen.reset(token)


@contextmanager
def show_progress() -> Iterator[None]:
    """Show a bar for each stage of the functions of lq that run inside, and how long it is going to take.

    The bars are tqdm's, on ``stderr`` or in the notebook. In a Trainer the callbacks show them in its own style.

    >>> import lq, torch
    >>> model = lq.attach(torch.nn.Sequential(torch.nn.Linear(4, 2)), weights=4, activations=8)
    >>> with lq.show_progress():
    ...     model = lq.calibrate(model, [torch.randn(8, 4)])
    """
    with shown_by(TqdmDisplay(sys.stderr)):
        yield


@dataclass(frozen=True)
class Iterations:
    """What each item consists of.

    Args:
        count: number of iterations.
        fewer: a smaller number, to say how long that would take; None: there is nothing to say.
        name: of the argument that sets it.
    """

    count: int
    fewer: int | None = None
    name: str = "iterations"


def steps(
    items: Iterable[T],
    title: str,
    *,
    unit: str = "batch",
    total: int | None = None,
    name: Callable[[T], str] | None = None,
    costs: Sequence[float] | None = None,
    iterations: Iterations | None = None,
) -> Iterable[T]:
    """`items`, behind a bar where somebody looks. The bar begins with the first item, not with the wait for it.

    Args:
        items: what a stage goes through.
        title: what it does, such as "Calibrating".
        unit: what an item is.
        total: how many there are; by default what `items` says of its length, if anything.
        name: the name of an item, to be shown.
        costs: what each item costs, in any unit; by default the same. What costs 0 is done already.
        iterations: what each item consists of, to be told.
    """
    screen = _screen.get()
    if screen is None:
        return items
    return _shown(items, _Stage(screen, title, unit, total, costs, iterations), name)


def _shown(items: Iterable[T], shown: "_Stage", name: Callable[[T], str] | None) -> Iterator[T]:
    before = operator.length_hint(items, 0)
    source = iter(items)
    try:
        for k, item in enumerate(source):
            if k == 0:
                left = operator.length_hint(source, 0)
                shown.open(before or (left + 1 if left else None))
            shown.begin(k, "" if name is None else name(item))
            yield item
            shown.end()
    finally:
        shown.close()


def parts(items: Sequence[T]) -> Iterable[T]:
    """`items` that one item of the stage consists of: they move its bar, if there is one."""
    screen = _screen.get()
    return items if screen is None or not screen.stages else _Parts(items, screen.stages[-1])


class _Parts(Iterable[Any]):
    def __init__(self, items: Sequence[Any], stage: "_Stage") -> None:
        self.items, self.stage = items, stage

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        part, share = self.stage.part, 1.0 / max(len(self.items), 1)
        for done, item in enumerate(self.items):
            yield item
            part(done + 1, share)


@contextmanager
def ticking(title: str, total: int, *, unit: str) -> Iterator[Callable[[], object]]:
    """A stage of at most so many items that are done here and there: each begins by a call of what is given."""
    ticks = iter(steps(range(total), title, unit=unit))
    try:
        yield lambda: next(ticks, None)
    finally:
        if isinstance(ticks, Generator):
            ticks.close()


@contextmanager
def stage(title: str, *names: str) -> Iterator[None]:
    """A stage of a few different parts, which begin with `at`; the first begins now."""
    screen = _screen.get()
    if screen is None:
        yield
        return
    shown = _Stage(screen, title, "part", len(names), None, None, names)
    try:
        shown.open(None)
        shown.begin(0, names[0])
        yield
    finally:
        shown.close()


def staged(title: str, *names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function be a `stage`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def staging(*args: P.args, **kwargs: P.kwargs) -> R:
            with stage(title, *names):
                return function(*args, **kwargs)

        return staging

    return decorate


def at(name: str) -> None:
    """Say which part of a `stage` begins."""
    screen = _screen.get()
    if screen is not None and screen.stages and name in screen.stages[-1].names:
        shown = screen.stages[-1]
        shown.begin(shown.names.index(name), name)


class _Stage:
    """Where a stage stands, and its bar."""

    def __init__(
        self,
        screen: _Screen,
        title: str,
        unit: str,
        total: int | None,
        costs: Sequence[float] | None,
        iterations: Iterations | None,
        names: Sequence[str] = (),
    ) -> None:
        self.screen, self.display = screen, screen.display
        self.title, self.unit, self.total, self.iterations = title, unit, total, iterations
        self.costs, self.names = costs, names
        self.bar: Bar | None = None
        self.text = title
        self.k, self.done, self.within = 0, 0.0, 0.0  # item; cost of what is done, and of what is done of the item
        self.speed: _Speed | None = None if names else _Speed()  # of parts that differ, nothing is known before
        self.next = self.begun = 0.0

    def open(self, total: int | None) -> None:
        """Show the bar of so many items, if that is not known already."""
        self.total = self.total or (len(self.costs) if self.costs is not None else total)
        self.bar = self.display.open()
        self.begun = time.monotonic()
        self.screen.stages.append(self)

    def begin(self, k: int, name: str) -> None:
        """Begin an item."""
        self.k, self.within = k, 0.0
        if self.names:
            self.done = float(k)
        of = "" if self.total is None else f" of {max(self.total, k + 1)}"
        self.text = f"{self.title}: {self.unit} {k + 1}{of}" + (f", {name}" if name else "")
        if k == 0 or self.names or time.monotonic() >= self.next:
            self._draw(time.monotonic())

    def part(self, count: int, share: float) -> None:
        """So many parts of the item are done, each a share of it."""
        now = time.monotonic()
        self.within = count * share * self._cost
        if self.speed is not None and count >= _WARM_UP:
            self._measure(now, count - _WARM_UP >= _PARTS)
        if now >= self.next:
            self._draw(now)

    def end(self) -> None:
        """The item is done."""
        self.done, self.within = self.done + self._cost, 0.0
        now = time.monotonic()
        if self.speed is not None and self.done > 0:
            self._measure(now, self.k + 1 > _ITEMS)
        if now >= self.next:
            self._draw(now)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.screen.stages.remove(self)
            self.bar.close()
            self.bar = None

    @property
    def _cost(self) -> float:
        return 1.0 if self.costs is None else self.costs[self.k]

    @property
    def _all(self) -> float | None:
        """What everything costs."""
        return self.total if self.costs is None else sum(self.costs)

    def _draw(self, now: float) -> None:
        everything = self._all
        share = None if not everything else min((self.done + self.within) / everything, 1.0)
        if self.bar is not None:
            self.bar.show(self.text, share)
        self.next = time.monotonic() + self.display.interval

    def _measure(self, now: float, enough: bool) -> None:
        """Once it runs steadily: say how long all of it is going to take, if that is long."""
        everything, done = self._all, self.done + self.within
        if self.speed is None or everything is None:
            return
        seconds = self.speed.seconds_for(now, done, everything - done, enough)
        if seconds is None:
            return
        self.speed = None  # told once
        if seconds + (now - self.begun) > _LONG:
            self.display.say(self._estimate(seconds + now - self.begun))

    def _estimate(self, seconds: float) -> str:
        count = self.total if self.costs is None else sum(cost > 0 for cost in self.costs)
        plural = {"batch": "batches"}.get(self.unit, f"{self.unit}s")
        items = f"{count} {plural if count != 1 else self.unit}"
        if self.iterations is None:
            return f"{self.title}: {items}, about {duration(seconds)}"
        each = self.iterations
        told = (
            f"{self.title}: {items} \N{MULTIPLICATION SIGN} {_spaced(each.count)} iterations, about {duration(seconds)}"
        )
        if each.fewer is not None and each.fewer < each.count:
            told += f"; {each.name}={each.fewer} takes about {duration(seconds * each.fewer / each.count)}"
        return told


class _Speed:
    """How fast work goes, measured from the first call on."""

    def __init__(self) -> None:
        self._since: tuple[float, float] | None = None

    def seconds_for(self, now: float, done: float, left: float, enough: bool) -> float | None:
        """Seconds for what is left; None: it is too early to say."""
        if self._since is None:
            self._since = now, done
            return None
        taken, did = now - self._since[0], done - self._since[1]
        if did <= 0 or taken < _SECONDS or not (enough or taken > 10 * _SECONDS):
            return None
        return left * taken / did


def duration(seconds: float) -> str:
    """Time in words, roughly.

    >>> [duration(seconds) for seconds in (40, 1080, 5400, 10800, 200000)]
    ['40 s', '18 min', '1.5 h', '3 h', '2.3 days']
    """
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        limit = 1.5 * length if unit != "days" else 2 * length
        if seconds >= limit:
            amount = seconds / length
            rounded = round(amount) if unit == "min" or amount >= 10 else round(amount, 1)
            return f"{rounded:g} {unit}"
    return f"{seconds:.0f} s"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


class TqdmDisplay:
    """Bars of tqdm.

    Args:
        file: where to.
        say: shows lines that stay; by default they go to `file` too.
    """

    def __init__(self, file: IO[str], say: Callable[[str], None] | None = None) -> None:
        self.file = file
        self.interval = 0.2 if file.isatty() or "ipykernel" in sys.modules else 5.0  # a log keeps every change
        self._say = say
        self._open: list[_TqdmBar] = []

    def open(self) -> Bar:
        """A new bar."""
        self._open.append(_TqdmBar(self))
        return self._open[-1]

    def closed(self, bar: "_TqdmBar") -> None:
        """A bar is gone."""
        self._open.remove(bar)

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        for bar in self._open:
            bar.tqdm.clear()
        if self._say is None:
            self.file.write(f"{text}\n")
        else:
            self._say(text)
        for bar in self._open:
            bar.tqdm.refresh()


class _TqdmBar:
    _KNOWN = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    _UNKNOWN = "{desc} [{elapsed}]"

    def __init__(self, display: TqdmDisplay) -> None:
        from tqdm.auto import tqdm

        self.display = display
        self.tqdm = tqdm(
            total=1.0,
            file=display.file,
            dynamic_ncols=True,
            leave=False,
            smoothing=0,
            bar_format=self._UNKNOWN,
            delay=1e-9,
        )

    def show(self, text: str, share: float | None) -> None:
        """Show it."""
        bar = self.tqdm
        bar.set_description_str(text, refresh=False)
        if share is not None:
            bar.bar_format, bar.n = self._KNOWN, share
        bar.refresh()

    def close(self) -> None:
        """Take it away."""
        self.tqdm.close()
        self.display.closed(self)
