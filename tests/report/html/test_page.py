"""The page: by itself, small, escaped, with the sections that have data."""

import html.parser
import json
import re

import pytest

from lq.errors import DataError, WriteError
from lq.report.html import History, Report, render, write_report
from lq.report.html.sections import SECTIONS
from tests.report.html.sample import sample


class Reader(html.parser.HTMLParser):
    """Notes tags with their attributes and what is open."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.headings, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_it_needs_nothing_but_itself(tmp_path):
    write_report(sample(20, 10), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    read = Reader(text)
    assert not read.open  # all tags are closed, in their order
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img|<iframe", text.replace("<!doctype html>", ""))
    names = {name for _, attributes in read.tags for name in attributes}
    assert not names & {"src", "srcset", "data", "onclick", "onload"}
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    ids = {attributes.get("id") for _, attributes in read.tags}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text


def test_its_size():
    assert len(render(sample(150, 200)).encode()) < 3_000_000


def test_names_are_escaped():
    evil = "<script>alert('x')</script>&\"<b>"
    report = sample(5, 3)
    report.title = evil
    report.summary["layers"][0]["name"] = evil
    report.sensitivity["losses"] = {evil: [1.0] * 8}
    report.channels = {evil: {"2": 1, "3": 1}}
    report.history.metrics = [{"step": 1.0, evil: 0.5}]
    report.settings = {evil: {evil: evil}}
    report.comparison["layers"][0]["advice"] = evil
    report.files = [{"path": evil, "bytes": 1}]
    read = Reader(render(report))
    assert not read.open and "script" not in {tag for tag, _ in read.tags}
    assert read.text.count(evil) >= 8


def test_sections_by_presence():
    titles = [title for title, _, _ in SECTIONS]
    assert Reader(render(sample(5, 5))).headings == titles
    empty = Reader(render(Report("net", "today")))
    assert empty.headings == ["Not in this report"]
    for name in ("AllocateBits", "Reconstruct", "CompareToFloat", "ExportModel", "FineTune", "validation data"):
        assert name in empty.text
    report = sample(5, 5)
    report.comparison = report.history = None
    read = Reader(render(report))
    assert "Layer by layer" not in read.headings and "Training" not in read.headings
    assert "Layer by layer: list CompareToFloat" in read.text


def test_what_was_measured_is_on_it():
    text = Reader(render(sample(8, 5))).text
    for shown in ("74.84 %", "75.47 %", "2.9 MB", "blocks.1.mlp.fc2", "model.onnx", "not reached by these batches"):
        assert shown in text


def test_json_goes_both_ways(tmp_path):
    report = sample(4, 4)
    path = write_report(report, tmp_path / "page.html")
    assert path == tmp_path / "page.json"
    found = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN
    assert found["title"] == "VisionTransformer" and len(found["summary"]["layers"]) == 4
    again = Report.from_json(path.read_text())
    assert render(again) == render(report)
    report.accuracy = {"float": float("nan")}
    assert json.loads(report.to_json())["accuracy"] == {"float": None}


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"title": "a", "created": "b", "more": 1}'])
def test_other_files(text):
    with pytest.raises(DataError, match="not a saved report"):
        Report.from_json(text)


def test_it_cannot_be_written(tmp_path):
    with pytest.raises(WriteError, match="cannot be written"):
        write_report(Report("a", "b"), tmp_path / "none" / "page.html")


def test_histories_are_thinned():
    history = History(steps=[1, 2, 3, 4], rates={"a": [1.0, 2.0, 3.0, 4.0]}, alpha=[[1.0]] * 4, widths=[[2.0]] * 4)
    history.thin()
    assert history.steps == [2, 4] and history.rates == {"a": [2.0, 4.0]} and len(history.alpha) == 2
