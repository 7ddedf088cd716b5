"""ReportQuantization in a Trainer: what it measures, gathers, writes, and when it does not."""

import csv
import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lq.callbacks import AllocateBits, CompareToFloat, ExportModel, FineTune, Quantize, ReportQuantization
from lq.errors import SpecError, StateError
from lq.report.html import Report
from tests.helpers import QUIET, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def run(tmp_path, *others, module=None, report=None, validation=True, **options):
    report = ReportQuantization(every=1, save_to=tmp_path / "r.html") if report is None else report
    module = tiny() if module is None else module
    made = trainer([report, Quantize(4, 4, fold_bn=False), *others], **options)
    made.fit(module, loader(), loader() if validation else None)
    return report.report, made, module


def test_everything(tmp_path):
    export = ExportModel(tmp_path / "m.safetensors")
    others = [AllocateBits("6x", samples=16), FineTune(), CompareToFloat(samples=16), export]
    report, _, module = run(tmp_path, *others, max_epochs=2)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for shown in ("Accuracy", "Sensitivity", "Pareto front", "Training", "Layer by layer", "m.safetensors", "val_loss"):
        assert shown in text, shown
    assert "Reconstruction: list Reconstruct" in text
    read = Report.from_json((tmp_path / "r.json").read_text())
    assert read.summary["layers"][0]["name"] == "net.0" and read.comparison and read.pareto and read.files
    history = report.history
    assert history.steps == list(range(1, 9)) and set(history.bits) == {"weights", "activations"}
    assert history.rates["optimizer"] == [0.05] * 8 and len(history.metrics) == 2
    assert any(share > 0 for line in history.changed.values() for share in line)
    with torch.no_grad():
        x, y = loader().dataset.tensors
        want = float((module.eval()(x).argmax(1) == y).float().mean())
    assert report.accuracy["final"] == pytest.approx(want) and report.accuracy_samples == 32
    assert set(report.accuracy) == {"float", "calibrated", "final"}


def test_the_float_network_is_measured(tmp_path):
    with torch.no_grad():
        x, y = loader().dataset.tensors
        want = float((tiny().eval()(x).argmax(1) == y).float().mean())
    report, _, _ = run(tmp_path, max_epochs=0)
    assert report.accuracy["float"] == pytest.approx(want) and "calibrated" not in report.accuracy


def test_without_validation_data_or_classes(tmp_path):
    report, _, _ = run(tmp_path, validation=False)
    assert report.accuracy is None and "give the Trainer validation data" in (tmp_path / "r.html").read_text()
    report, _, _ = run(tmp_path, report=ReportQuantization(samples=0))
    assert report.accuracy is None


def test_a_second_fit(tmp_path):
    callback = ReportQuantization(every=1, save_to=tmp_path / "r.html")
    first, _, module = run(tmp_path, report=callback)
    second, _, _ = run(tmp_path, report=callback, module=module)
    assert second is not first and second.accuracy["float"] == first.accuracy["float"]
    other, _, _ = run(tmp_path, report=callback, module=tiny(seed=1))
    assert len(other.history.steps) == 4  # nothing of the module before


def test_trials_write_nothing(tmp_path):
    report, _, _ = run(tmp_path, fast_dev_run=True)
    assert report is not None and not list(tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path):
    callback = ReportQuantization(save_to=tmp_path / "r.html")
    made = trainer([Quantize(), callback], max_epochs=0)
    kind = type(made.strategy)
    kind.is_global_zero, before = property(lambda self: False), kind.is_global_zero
    try:
        made.fit(tiny(), loader())
    finally:
        kind.is_global_zero = before
    assert callback.report is not None and not (tmp_path / "r.html").exists()


def test_rows_of_loggers_do_not_collide(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run(tmp_path, logger=logger, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row.get("report/final_accuracy")]
    assert len(ours) == 1 and int(ours[0]["step"]) == 4
    assert all(int(row["step"]) < 4 for row in rows if row is not ours[0])
    assert (tmp_path / "r.html").exists()


def test_by_default_it_goes_to_the_log_folder(tmp_path):
    run(tmp_path, report=ReportQuantization(), logger=CSVLogger(tmp_path, name="logs", version=1))
    folder = tmp_path / "logs" / "version_1"
    assert (folder / "quantization.html").exists() and json.loads((folder / "quantization.json").read_text())


def test_its_state_goes_on(tmp_path):
    callback = ReportQuantization(every=1)
    _, made, _ = run(tmp_path, report=callback)
    made.save_checkpoint(tmp_path / "a.ckpt")
    again = ReportQuantization(every=1)
    fit(tiny(), [again, Quantize(4, 4, fold_bn=False)], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert again.report.history.steps == list(range(1, 9))
    assert again.report.accuracy["float"] == callback.report.accuracy["float"]


def test_wrong_arguments():
    with pytest.raises(SpecError, match="samples=-1"):
        ReportQuantization(samples=-1)
    with pytest.raises(SpecError, match="every=0"):
        ReportQuantization(every=0)
    with pytest.raises(StateError, match="ReportQuantization needs a model with quantizers"):
        fit(tiny(), [ReportQuantization()])


def test_tensorboard_gets_the_figures(tmp_path):
    """As images of an event file that TensorBoard itself reads."""
    pytest.importorskip("matplotlib")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="", version="")
    others = [AllocateBits("6x", samples=16), FineTune(), CompareToFloat(samples=16)]
    _, made, _ = run(tmp_path, *others, max_epochs=2, logger=logger)
    logger.finalize("success")
    found = events.EventAccumulator(str(tmp_path), size_guidance={events.IMAGES: 0}).Reload()
    assert {"report/bits", "report/pareto", "report/rates", "report/changed", "comparison"} <= set(
        found.Tags()["images"]
    )
    (image,) = found.Images("report/bits")
    assert image.step == made.global_step and image.width == 600 and image.height == 450
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert found.Scalars("report/average_bits")[0].step == made.global_step
