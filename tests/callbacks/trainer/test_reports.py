"""Where callbacks write, and that nothing is seen half-written."""

import pytest
from lightning.pytorch.loggers import CSVLogger

from lq.callbacks.trainer.reports import report_path, write_text
from tests.helpers import trainer


def test_a_path_that_was_given(tmp_path):
    path = report_path(trainer(root=tmp_path), "x.json", tmp_path / "a" / "b.json")
    assert path == tmp_path / "a" / "b.json"
    assert path.parent.is_dir() and not path.exists()
    assert report_path(trainer(root=tmp_path), "x.json", str(tmp_path / "c.json")) == tmp_path / "c.json"


def test_the_loggers_folder(tmp_path):
    made = trainer(logger=CSVLogger(tmp_path, name="run", version=3))
    assert report_path(made, "x.json", None) == tmp_path / "run" / "version_3" / "x.json"


@pytest.mark.filterwarnings("ignore:.*Checkpoint")
def test_a_trainer_that_keeps_checkpoints(tmp_path):
    made = trainer(root=tmp_path, enable_checkpointing=True)
    assert report_path(made, "x.json", None) == tmp_path / "x.json"


def test_a_trainer_that_keeps_nothing(tmp_path):
    assert report_path(trainer(root=tmp_path), "x.json", None) is None


def test_trials_and_other_ranks_write_nothing(tmp_path):
    assert report_path(trainer(root=tmp_path, fast_dev_run=True), "x.json", tmp_path / "x.json") is None
    made = trainer(root=tmp_path)
    type(made.strategy).is_global_zero, before = property(lambda self: False), type(made.strategy).is_global_zero
    try:
        assert report_path(made, "x.json", tmp_path / "deep" / "x.json") is None
    finally:
        type(made.strategy).is_global_zero = before
    assert not (tmp_path / "deep").exists()


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "long, long text")
    with path.open() as reader:
        write_text(path, "näu")
        assert reader.read() == "long, long text"  # who has it open reads the file as it was
    assert path.read_text(encoding="utf-8") == "näu"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udc80")
    assert path.read_text() == "before"
