"""Messages about wrong arguments."""

import pytest

from lq.cli.usage import UsageError, one_line, plain, require


def test_a_message_in_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"


UNION = "Does not validate against any of the Union subtypes\nSubtypes: [<class 'a'>]\nErrors:\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("anything\nelse", "anything else"),
        ('Parser key "config": no file', "--config: no file"),
        (
            f"Parser key \"data\": {UNION}- Option 'x' is not accepted\n- Expected a <class 'NoneType'>\n"
            "Given value type: <class 'b'>\nGiven value: c",
            "--data: Option 'x' is not accepted",
        ),
        (
            f"Parser key \"a.b\": {UNION}- Expected a <class 'int'>\n- Expected a <class 'float'>\n"
            "Given value type: <class 'str'>\nGiven value: many",
            "--a.b: expected int or float, got many",
        ),
    ],
)
def test_what_a_typed_parser_says_in_fewer_words(message, expected):
    assert plain(message) == expected


def test_packages_that_are_not_there():
    require("torch", "cli")
    with pytest.raises(UsageError, match=r"needs Thing, which is not installed: pip install 'lq-lightning\[cli\]'"):
        require("no_such_package", "cli", "Thing")
