"""Name patterns: what they match, and what the error says when they match nothing."""

import pytest

from lq.errors import PatternError
from lq.structure.patterns import ancestors, matches, select

NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer10.0.conv1", "fc"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fc", {"fc"}),
        ("conv1", {"conv1"}),
        ("layer1", {"layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"}),
        ("layer1.0", {"layer1.0.conv1", "layer1.0.conv2"}),
        ("layer*.conv1", {"layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1"}),
        ("layer1.?.conv1", {"layer1.0.conv1", "layer1.1.conv1"}),
        ("*", set(NAMES)),
        (["fc", "conv?"], {"fc", "conv1"}),
        ([], set()),
    ],
)
def test_select(pattern, expected):
    assert select(pattern, NAMES, argument="include") == expected


def test_case_counts():
    assert not matches("FC", "fc")


def test_ancestors():
    assert ancestors("a.b") == ["a.b", "a"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("conv", "include pattern 'conv' matches none of the 6 layers; did you mean 'conv1'"),
        ("laier1", "did you mean 'layer1'"),
        ("*.conv2.*", "'layer1.0.conv2'"),
        ("zzz", "did you mean 'conv1', 'layer1.0.conv1', 'layer1.0'"),
    ],
)
def test_nothing_found(pattern, message):
    with pytest.raises(PatternError, match=message.replace("*", r"\*")):
        select(["fc", pattern], NAMES, argument="include")


def test_nothing_to_find():
    with pytest.raises(PatternError, match="exclude pattern 'a' matches none of the 0 layers; the model has no layer"):
        select("a", [], argument="exclude")
