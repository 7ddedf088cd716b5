"""The report: as JSON and back, as a table, as a plot."""

import pytest

from lq.errors import DataError
from lq.reconstruction import Merges, Reconstruction, UnitReport

UNITS = (
    UnitReport("stem+act", 0.5, 0.25, (0.5, 0.3), 20, 1.5),
    UnitReport("layer1.0+layer1.1", 12.3456789, 1.0, [2.0, 1.0], 20, 2.0),
    UnitReport("fc", 1e-9, 0.0, (), 0, 0.0),
)
MERGES = Merges(
    "modcap",
    ("stem+act", "layer1.0", "layer1.1", "fc"),
    (1.0, 2.0, 30.0, 4.0),
    ("stem+act", "layer1.0+layer1.1", "fc"),
    (("layer1.1", "fc"),),
)
PLAIN, MERGED = Reconstruction(UNITS), Reconstruction(UNITS, MERGES)


@pytest.mark.parametrize("report", [PLAIN, MERGED], ids=["plain", "merged"])
def test_json_and_back(report):
    again = Reconstruction.from_json(report.to_json())
    assert again.merges == report.merges
    assert [(u.name, u.before, u.after, list(u.curve), u.iterations, u.seconds) for u in again.units] == [
        (u.name, u.before, u.after, list(u.curve), u.iterations, u.seconds) for u in report.units
    ]
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"units": []}', '{"units": [1], "merges": null}', '{"units": [], "merges": {}}']
)
def test_something_else_is_an_error(text):
    with pytest.raises(DataError, match=r"not a saved reconstruction: .*write reconstruction.to_json\(\) to the file"):
        Reconstruction.from_json(text)


def test_the_table():
    table = PLAIN.table()
    assert table.header == ("unit", "loss before", "loss after", "iterations", "seconds")
    assert table.rows[1] == ("layer1.0+layer1.1", "12.35", "1", "20", "2.0")
    assert table.notes == ("3 units, 4 seconds",)
    notes = MERGED.table().notes
    assert notes[1:] == (
        "merged by modcap: layer1.0+layer1.1",
        "not merged, since fc reads more than the output of layer1.1",
    )
    none = Reconstruction(UNITS, Merges("loss", ("a",), (1.0,), ("a",), ()))
    assert none.table().notes[1] == "merged by loss: none"
    assert "layer1.0+layer1.1" in str(PLAIN)


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of files."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    found = []
    original = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path, **kw: (found.append(self), original(self, path, **kw))[1])
    return found


def test_the_plot_has_both_losses_of_every_unit(drawn, tmp_path):
    MERGED.plot(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
    before, after = drawn[0].axes[0].lines
    assert before.get_ydata().tolist() == [u.before for u in UNITS]
    assert after.get_ydata().tolist() == [u.after for u in UNITS]
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == [u.name for u in UNITS]


def test_others_are_drawn_where_their_units_end(drawn, tmp_path):
    units = tuple(UnitReport(name, 1.0, loss, (), 1, 0.0) for name, loss in (("stem+act", 3.0), ("layer1.1", 7.0)))
    MERGED.plot(tmp_path / "losses.png", {"qdrop": Reconstruction(units)})
    other = drawn[0].axes[0].lines[2]
    assert (other.get_xdata().tolist(), other.get_ydata().tolist()) == ([0, 1], [3.0, 7.0])
    assert other.get_label() == "qdrop"


def test_a_plot_of_losses_that_are_all_zero(tmp_path):
    pytest.importorskip("matplotlib")
    Reconstruction((UnitReport("a", 0.0, 0.0, (), 1, 0.0),)).plot(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").exists()
