"""The line that says what came of a fit, and the rows that loggers get."""

import csv

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lq.callbacks import (
    AllocateBits,
    CompareToFloat,
    ExportModel,
    FineTune,
    OptimizeRanges,
    Quantize,
    Reconstruct,
    ReportQuantization,
)
from tests.helpers import QUIET, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def results(records):
    return [r.getMessage() for r in records if r.getMessage().startswith("Result")]


def test_all_of_it(tmp_path, caplog):
    checkpoint = ModelCheckpoint(tmp_path / "kept")
    report = ReportQuantization(save_to=tmp_path / "r.html")
    export = ExportModel(tmp_path / "m.safetensors")
    with caplog.at_level("INFO"):
        made = trainer([Quantize(4, 4), report, FineTune(), export, checkpoint], enable_checkpointing=True)
        made.fit(tiny(), loader(), loader())
    (line,) = results(caplog.records)
    assert line.startswith("Result: Tiny, ") and " → " in line and "bits per quantized weight" in line
    before, after = (100 * report.report.accuracy[name] for name in ("float", "final"))
    assert f"accuracy {before:.2f} % → {after:.2f} % ({after - before:+.2f})" in line
    paths = f"checkpoint {checkpoint.best_model_path}, packed {export.path}, report {tmp_path / 'r.html'}"
    assert line.endswith(f"; {paths}")
    caplog.clear()
    with caplog.at_level("INFO"):
        made.validate(made.lightning_module, loader(), verbose=False)
    assert not results(caplog.records)


def test_what_is_not_known_is_not_said(caplog):
    with caplog.at_level("INFO"):
        fit(tiny(), [Quantize(8, 8)], max_epochs=0)
    (line,) = results(caplog.records)
    assert "accuracy" not in line and ";" not in line
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(tiny(), [Quantize(8, 8), ExportModel("never.onnx")], fast_dev_run=True)
    assert "never" not in results(caplog.records)[0]


def test_a_fit_that_fails_has_no_result(caplog):
    module = tiny()
    module.training_step = lambda *_: 1 / 0
    with caplog.at_level("INFO"), pytest.raises(ZeroDivisionError):
        fit(module, [Quantize(8, 8)])
    assert not results(caplog.records)


def test_other_ranks_say_nothing(caplog):
    made = trainer([Quantize()], max_epochs=0)
    kind = type(made.strategy)
    kind.is_global_zero, before = property(lambda self: False), kind.is_global_zero
    try:
        with caplog.at_level("INFO"):
            made.fit(tiny(), loader())
    finally:
        kind.is_global_zero = before
    assert not results(caplog.records)


def test_rows_never_collide_with_those_of_training(tmp_path):
    found = [
        AllocateBits("4x", samples=16),
        OptimizeRanges(samples=16, evaluations=2),
        Reconstruct(iterations=2, samples=16, units="layer"),
        FineTune(),
        CompareToFloat(samples=16),
        ReportQuantization(),
    ]
    logger = CSVLogger(tmp_path, name="", version="")
    module = tiny()
    step = module.training_step

    def training_step(batch, batch_idx):
        loss = step(batch, batch_idx)
        module.log("loss", loss)
        return loss

    module.training_step = training_step
    fit(module, [Quantize(4, 4), *found], logger=logger, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {name for row in rows for name, value in row.items() if value and "/" in name}
    assert {name.split("/")[0] for name in names} == {"allocation", "ranges", "reconstruction", "comparison", "report"}
    training = [int(row["step"]) for row in rows if row["loss"]]
    ours = [int(row["step"]) for row in rows if any(row[name] for name in names)]
    assert training == [0, 1, 2, 3] and set(ours) == {4}
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)


def test_numbers_of_a_run_are_its_own(tmp_path):
    callback = AllocateBits("4x", samples=16)
    module = tiny()
    fit(module, [Quantize(4, 4), callback], max_epochs=0)
    assert callback.numbers["allocation/average_bits"] > 0
    fit(module, [Quantize(4, 4), callback], max_epochs=0, logger=CSVLogger(tmp_path))
    assert not callback.numbers  # nothing was allocated anew
