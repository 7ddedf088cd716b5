"""lq report: the page of a saved report, and one line for files that are none."""

import json

import pytest

from lq.report.html import render
from tests.cli.running import SILENT, complains, succeeds
from tests.report.html.sample import sample

pytestmark = SILENT


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "quantization.json"
    path.write_text(sample(6, 20).to_json(), encoding="utf-8")
    return path


def test_the_page_again(saved, tmp_path, capsys):
    out = tmp_path / "page.html"
    said = succeeds(capsys, "report", saved, "--out", out)
    assert out.read_text(encoding="utf-8") == render(sample(6, 20))
    assert said.startswith(f"{out}: {out.stat().st_size / 1e3:.0f} kB, {sample(6).title} of ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "quantization.json"]


def test_beside_the_file(saved, capsys):
    before = saved.read_text(encoding="utf-8")
    succeeds(capsys, "report", saved)
    assert saved.with_suffix(".html").read_text(encoding="utf-8") == render(sample(6, 20))
    assert saved.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "{path}: not a saved report: "),
        ("[]", "{path}: not a saved report: "),
        ('{"title": "a"}', "{path}: not a saved report: expected 'title' and 'created'; give the JSON file that Rep"),
        ('{"title": "a", "created": "b", "x": 1}', "{path}: not a saved report: no key 'x'; give the JSON file that "),
        (
            '{"title": "a", "created": "b", "summary": 3}',
            "{path}: not a saved report: a part of it is of another form (TypeError: ",
        ),
        (
            '{"title": "a", "created": "b", "comparison": {"layers": [{}]}}',
            "{path}: not a saved report: a part of it is of another form (KeyError: ",
        ),
    ],
)
def test_other_files(content, message, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    said = complains(capsys, "report", path)
    assert said.startswith(f"lq report: {message.format(path=path)}")
    assert not path.with_suffix(".html").exists()


def test_wrong_arguments(saved, capsys):
    out = saved.with_suffix(".txt")
    assert complains(capsys, "report", saved, "--out", out) == f"lq report: --out {out}: the name should end in .html"
    assert complains(capsys, "report", "no.json") == "lq report: there is no file no.json"
    missing = saved.parent / "nowhere" / "page.html"
    assert complains(capsys, "report", saved, "--out", missing).startswith("lq report: ")
    with pytest.raises(SystemExit, match="2"):
        complains(capsys, "report", saved, "--ot", "x")
    assert "did you mean --out?" in capsys.readouterr().err


def test_numbers_that_are_not_finite(tmp_path, capsys):
    report = sample(6, 20)
    report.pareto = [[4.0, float("inf")], [3.0, 1.0]]
    path = tmp_path / "r.json"
    path.write_text(report.to_json())
    assert json.loads(path.read_text())["pareto"][0] == [4.0, None]
    succeeds(capsys, "report", path)
