"""Bars: what is shown of a loop, when, and that nothing is where nobody looks."""

import io
import sys
import threading
import time

import pytest
import torch
from torch import nn

import lq
from lq import bars
from lq.sensitivity import BruteForce, HawqV2


class Screen:
    """A display that notes what it is asked to show."""

    interval = 0.0

    def __init__(self):
        self.shown, self.said, self.open_now = [], [], 0

    def open(self):
        self.open_now += 1
        return self

    def show(self, text, share):
        self.shown.append((text, share))

    def close(self):
        self.open_now -= 1

    def say(self, text):
        self.said.append(text)

    @property
    def titles(self):
        return list(dict.fromkeys(text.split(":")[0] for text, _ in self.shown))


class Clock:
    """Stands for the time: it passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bars.time, "monotonic", lambda: self.now)


@pytest.fixture
def screen():
    found = Screen()
    with bars.shown_by(found):
        yield found
    assert not found.open_now


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(3)]
    return lq.calibrate(lq.attach(net, 4, 4), batches), batches


def test_without_a_display_loops_get_what_they_give():
    items = [1, 2]
    assert bars.steps(items, "Title") is items
    assert bars.parts(items) is items
    bars.at("anything")


def test_items_and_parts(screen):
    for item in bars.steps(["a", "b"], "Working", unit="unit", name=str, costs=[1.0, 3.0]):
        assert list(bars.parts(range(2))) == [0, 1], item
    assert screen.shown[0] == ("Working: unit 1 of 2, a", 0.0)
    assert [share for _, share in screen.shown] == [0, 0.125, 0.25, 0.25, 0.25, 0.625, 1.0, 1.0]
    assert screen.shown[-1][0] == "Working: unit 2 of 2, b"


def test_an_item_that_ends_early_counts_in_full(screen):
    for _ in bars.steps([1, 2], "Working"):
        for _ in bars.parts(range(100)):
            break
    assert screen.shown[-1][1] == 1.0


def test_how_many_there_are(screen):
    class Counted:
        def __init__(self):
            self.left = 3

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            self.left -= 1
            return self.left

        def __length_hint__(self):  # nothing is known before the first
            return self.left if self.left < 3 else 0

    for items, text in (([1], "1 of 1"), (iter([1, 2]), "1 of 2"), (Counted(), "1 of 3"), ((i for i in [1]), "1")):
        screen.shown.clear()
        list(bars.steps(items, "Working"))
        assert screen.shown[0][0] == f"Working: batch {text}"
    assert screen.shown[0][1] is None


def test_the_bar_waits_for_the_first_item(screen):
    def source():
        yield from bars.steps([1], "Making")

    list(bars.steps(source(), "Reading"))
    assert screen.titles == ["Making", "Reading"]
    screen.shown.clear()
    assert not list(bars.steps([], "Nothing")) and not screen.shown


@pytest.mark.parametrize("how", ["break", "raise"])
def test_a_loop_that_is_left_takes_its_bar_away(how, screen):
    def work():
        for _ in bars.steps([1, 2], "Working"):
            if how == "raise":
                raise ValueError("it failed")
            break

    if how == "raise":
        with pytest.raises(ValueError, match="it failed"):
            work()
    else:
        work()
    assert not screen.open_now
    assert bars.parts([1]) == [1]  # no stage is left


def test_a_stage(screen):
    @bars.staged("Exporting", "one", "two")
    def work():
        bars.at("two")
        bars.at("of something else")
        return 5

    assert work() == 5
    assert screen.shown == [("Exporting: part 1 of 2, one", 0.0), ("Exporting: part 2 of 2, two", 0.5)]


def test_bars_change_only_now_and_then(screen, monkeypatch):
    clock = Clock(monkeypatch)
    screen.interval = 0.2
    for _ in bars.steps([1], "Working"):
        for _ in bars.parts(range(1000)):
            clock.now += 0.001
    assert len(screen.shown) <= 1 + 1.0 / 0.2


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.01, []),
        (60.0, ["Working: 3 units × 20 000 iterations, about 2.1 days; iterations=2000 takes about 5 h"]),  # noqa: RUF001
    ],
)
def test_long_work_is_told_of(seconds, said, screen, monkeypatch):
    clock = Clock(monkeypatch)
    costs, iterations = [0.0, 1.0, 2.0], bars.Iterations(20_000, 2_000)
    for unit in bars.steps([0, 1, 2], "Working", unit="unit", costs=costs, iterations=iterations):
        for step in bars.parts(range(1000)) if unit else ():
            clock.now += 500.0 if not step and seconds > 1 else seconds * unit  # the first is slow
    expected = [text.replace("3 units", "2 units") for text in said]  # one was done already
    assert screen.said == expected


def test_the_estimate_is_right_for_steady_work(screen, monkeypatch):
    clock = Clock(monkeypatch)
    for _ in bars.steps(range(10), "Measuring"):
        clock.now += 60.0
    assert screen.said == ["Measuring: 10 batches, about 10 min"]


def test_every_function_has_a_bar(screen, tmp_path):
    model, batches = network()
    assert screen.titles == ["Calibrating"]
    table = lq.measure_sensitivity(model, batches)
    lq.allocate(model, table, "6x")
    lq.optimize_ranges(model, batches, evaluations=5)
    lq.compare(model, batches)
    lq.reconstruct(model, batches, units="layer", loss="fisher", iterations=3)
    lq.export_program(model, batches[0][0], tmp_path / "m.pt2")
    lq.synthesize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (1, 5, 5), 4, iterations=2)
    known = ["Calibrating", "Measuring sensitivity", "Allocating", "Optimizing ranges", "Comparing", "Reading samples"]
    assert screen.titles == [*known, "Measuring gradients", "Reconstructing", "Exporting", "Synthesizing"]
    assert ("Reconstructing: unit 2 of 2, 2", 1.0) in screen.shown
    assert ("Measuring sensitivity: batch 3 of 3", 1.0) in screen.shown


@pytest.mark.parametrize("metric", [BruteForce("kl"), HawqV2(vectors=4, tolerance=0.0)], ids=lambda m: type(m).__name__)
def test_batches_that_take_long_move_the_bar_on_the_way(metric, screen):
    model, batches = network()
    screen.shown.clear()
    lq.measure_sensitivity(model, batches[:1], metric)
    assert len({share for _, share in screen.shown if share is not None and 0 < share < 1}) >= 2


def test_results_do_not_depend_on_who_looks():
    def run():
        model, batches = network()
        found = lq.reconstruct(model, batches, units="layer", iterations=20)
        return [unit.after for unit in found.units], torch.get_rng_state()

    alone, state = run()
    with bars.shown_by(Screen()):
        watched, after = run()
    assert watched == alone and torch.equal(state, after)


def test_a_users_own_watch_gets_steps_with_a_length(screen):
    model, batches = network()
    lengths = []

    def watch(steps, name):
        lengths.append((name, len(steps)))
        return steps

    lq.reconstruct(model, batches, units="layer", iterations=3, watch=watch)
    assert lengths == [("0+1", 3), ("2", 3)]


def test_show_progress(capsys):
    model, batches = network()
    lq.calibrate(model, batches)
    assert capsys.readouterr() == ("", "")
    with lq.show_progress():
        lq.calibrate(model, batches)
    seen = capsys.readouterr()
    assert "Calibrating: batch 1 of 3" in seen.err and not seen.out
    lq.calibrate(model, batches)
    assert capsys.readouterr() == ("", "")


def test_tqdm_with_a_line_above():
    file, said = io.StringIO(), []
    for say in (None, said.append):
        display = bars.TqdmDisplay(file, say)
        assert display.interval == 5.0  # a file keeps every change
        bar = display.open()
        bar.show("Working", 0.25)
        display.say("long")
        bar.close()
    text = file.getvalue()
    assert "Working  25%|" in text and "long\n" in text and said == ["long"]


def test_threads_do_not_see_each_others_bars(screen):
    inside = []
    for _ in bars.steps([1], "Working"):
        thread = threading.Thread(target=lambda: inside.append(bars.parts([1])))
        thread.start()
        thread.join()
    assert inside == [[1]]


def test_a_step_costs_next_to_nothing():
    """Less than 1 % of a step of a millisecond, with a bar that is shown on a terminal of its own."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    count = 20_000
    with bars.shown_by(bars.TqdmDisplay(Terminal())):
        for _ in bars.steps([1], "Working", iterations=bars.Iterations(count)):
            begun = time.thread_time()
            for _ in bars.parts(range(count)):
                pass
            taken = time.thread_time() - begun
    assert taken / count < 1e-5


def test_importing_it_loads_no_tqdm():
    assert "tqdm" not in vars(bars) and sys.modules["lq.bars"] is bars
