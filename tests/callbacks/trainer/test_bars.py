"""Bars in a Trainer: in its style, on the first rank, or not at all."""

import io
import logging

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lq import bars
from lq.callbacks import (
    AllocateBits,
    CompareToFloat,
    ExportModel,
    FineTune,
    OptimizeRanges,
    Quantize,
    Reconstruct,
    ReportQuantization,
    SynthesizeData,
)
from lq.callbacks.trainer.bars import RichDisplay, _clock, _display_of
from tests.helpers import QUIET, fit, loader, run_on_ranks, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

STAGES = [
    "Calibrating: batch 1 of 4",
    "Measuring sensitivity: batch 1 of 4",
    "Allocating: part 1 of 1",
    "Optimizing ranges: evaluation 1 of 15",
    "Reading samples: batch 1 of 4",
    "Reconstructing: unit 1 of 3, net.0",
    "Measuring accuracy: batch 1",
    "Measuring BatchNorm: batch 1 of 2",
    "Comparing: batch 1 of 2",
    "Exporting: part 1 of 2, translating",
]


@pytest.fixture
def quiet(monkeypatch):
    """No log lines of Lightning or lq, which do not depend on bars."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


def chain(path):
    return [
        Quantize(4, 4, fold_bn=False),
        AllocateBits("4x", samples=32),
        OptimizeRanges(samples=32, evaluations=3),
        Reconstruct(iterations=3, samples=32, units="layer"),
        FineTune(reestimate_bn=16),
        CompareToFloat(samples=16),
        ExportModel(path / "m.pt2"),
        ReportQuantization(samples=16),
    ]


def run(path, **options):
    made = trainer(chain(path), **options)
    made.fit(tiny(), loader(), loader())


def test_nothing_is_shown_without_a_progress_bar(tmp_path, quiet, capfd):
    run(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_tqdm_shows_every_stage(tmp_path, quiet, capfd):
    made = trainer([*chain(tmp_path), TQDMProgressBar()], enable_progress_bar=True)
    made.fit(tiny(), loader(), loader())
    seen = capfd.readouterr().out
    for text in STAGES:
        assert text in seen, text


def test_images_are_made_before_the_bar_that_reads_them(quiet, capfd):
    chain = [SynthesizeData((1, 6, 6), samples=8, iterations=2), Quantize(4, 4), TQDMProgressBar()]
    fit(tiny(), chain, max_epochs=0, enable_progress_bar=True)
    seen = capfd.readouterr().out
    assert 0 < seen.index("Synthesizing: batch 1 of 1") < seen.index("Calibrating")


def test_a_progress_bar_that_is_off(quiet, capfd):
    fit(tiny(), [Quantize(4, 4), TQDMProgressBar(refresh_rate=0)], max_epochs=0, enable_progress_bar=True)
    assert "Calibrating" not in capfd.readouterr().out


def test_other_ranks_are_silent(quiet, capfd):
    made = trainer([Quantize(4, 4), TQDMProgressBar()], max_epochs=0, enable_progress_bar=True)
    kind = type(made.strategy)
    kind.is_global_zero, before = property(lambda self: False), kind.is_global_zero
    try:
        made.fit(tiny(), loader())
    finally:
        kind.is_global_zero = before
    assert "Calibrating" not in capfd.readouterr().out


def rich_bar(file):
    return RichProgressBar(console_kwargs={"force_terminal": True, "file": file, "width": 100, "_environ": {}})


def test_rich_where_the_trainer_has_it(tmp_path, quiet):
    pytest.importorskip("rich")
    file = io.StringIO()
    made = trainer([*chain(tmp_path), rich_bar(file)], enable_progress_bar=True)
    made.fit(tiny(), loader(), loader())
    seen = file.getvalue()
    for text in STAGES:
        assert text[:40] in seen, text
    assert "━" in seen and "Epoch 0" in seen


def test_rich_on_what_is_no_terminal_becomes_tqdm():
    pytest.importorskip("rich")
    bar = RichProgressBar(console_kwargs={"file": io.StringIO(), "_environ": {}})
    assert isinstance(_display_of(trainer([bar], enable_progress_bar=True)), bars.TqdmDisplay)
    shown = _display_of(trainer([rich_bar(io.StringIO())], enable_progress_bar=True))
    assert isinstance(shown, RichDisplay)
    assert _display_of(trainer()) is None


def test_lines_above_a_rich_bar(monkeypatch):
    pytest.importorskip("rich")
    file, said = io.StringIO(), []
    monkeypatch.setattr("lq.callbacks.trainer.bars.rank_zero_info", said.append)
    shown = _display_of(trainer([rich_bar(file)], enable_progress_bar=True))
    bar = shown.open()
    bar.show("Working", 0.5)
    bar.show("Working", None)
    shown.say("it takes long")
    bar.close()
    assert said == ["it takes long"] and "Working" in file.getvalue() and " 50%" in file.getvalue()
    assert _clock(3725) == "1:02:05"


def test_long_work_is_told_of_by_the_log(monkeypatch, caplog):
    monkeypatch.setattr(bars, "_LONG", 0.0)
    monkeypatch.setattr(bars, "_SECONDS", 0.0)
    reconstruct = Reconstruct(iterations=30, samples=32, units="layer")
    for shown in (False, True):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(tiny(), [Quantize(4, 4), reconstruct], max_epochs=0, enable_progress_bar=shown)
        told = [r.getMessage() for r in caplog.records if "iterations, about" in r.getMessage()]
        assert [text.split(",")[0] for text in told] == (["Reconstructing: 3 units × 30 iterations"] if shown else [])  # noqa: RUF001


SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import contextlib
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lq.callbacks import Quantize, Reconstruct
from tests.helpers import loader, tiny, trainer

torch.set_num_threads(1)
chain = [Quantize(4, 4), Reconstruct(iterations=3, samples=32, units="layer"), TQDMProgressBar()]
made = trainer(chain, devices=int(sys.argv[1]), strategy="ddp", max_epochs=0, enable_progress_bar=True)
with open(f"{sys.argv[2]}/rank{made.global_rank}.txt", "w") as file, contextlib.redirect_stdout(file):
    made.fit(tiny(), loader(batch=4))
made.strategy.barrier()
torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


@pytest.mark.slow
def test_of_two_ranks_one_speaks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 2, tmp_path)
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert "Calibrating: batch 1 of 4" in first and "Reconstructing: unit 1 of 3" in first
    assert not second


def test_the_callbacks_are_lightnings():
    assert issubclass(type(Quantize()), pl.Callback)
