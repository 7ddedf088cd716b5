"""Figures of a report, and the loggers that get them."""

import pytest
from lightning.pytorch.loggers import CSVLogger

from lq.callbacks import AllocateBits, FineTune, Quantize, Reconstruct, ReportQuantization
from lq.callbacks.trainer.report_figures import figures_of
from lq.report.html import History, Report
from tests.helpers import QUIET, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
pytest.importorskip("matplotlib")


def test_only_what_there_are_values_for():
    assert figures_of(Report("Net", "now")) == {}
    assert not figures_of(Report("Net", "now", history=History(steps=[1])))
    report = Report("Net", "now", pareto=[[2.0, 0.1], [3.0, 0.01]], chosen=[2.5, 0.05])
    (axes,) = figures_of(report)["pareto"]().axes
    assert axes.lines[0].get_xydata().tolist() == report.pareto
    assert axes.lines[1].get_xydata().tolist() == [report.chosen]


def test_series_that_begin_later_end_with_the_last_step():
    history = History(steps=[1, 2, 3], rates={"a": [0.1, 0.2, 0.3], "b": [1.0, 2.0]})
    drawn = figures_of(Report("Net", "now", history=history))
    assert list(drawn) == ["rates"]
    (axes,) = drawn["rates"]().axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 2, 3], [2, 3]]


def test_a_logger_that_takes_figures_gets_all(tmp_path):
    figures = []

    class Board(CSVLogger):
        def __init__(self, root):
            super().__init__(root)
            self.experiment.add_figure = lambda name, figure, global_step: figures.append((name, global_step))

    chain = [Quantize(4, 4), AllocateBits("4x", samples=16), Reconstruct(iterations=2, samples=16), FineTune()]
    made = trainer([*chain, ReportQuantization(every=1)], logger=Board(tmp_path), log_every_n_steps=1)
    made.fit(tiny(), loader(), loader())
    names = ["bits", "pareto", "rates", "widths", "changed"]
    assert figures == [("reconstruction", 0), *((f"report/{name}", 4) for name in names)]
