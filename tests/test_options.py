"""Options written once: signatures, docstrings, attributes and errors of what takes them."""

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
import typing
from dataclasses import FrozenInstanceError, dataclass, field

import pytest

from lq.options import after, ordered_fields, takes, texts_of, with_args


@dataclass(frozen=True)
class Bread:
    """How bread is cut.

    Args:
        thickness: of a slice,
            in mm.
        toasted: whether it was.
    """

    thickness: int = 8
    toasted: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        if self.thickness < 1:
            raise ValueError(f"thickness={self.thickness}; a slice has at least 1")


@dataclass(frozen=True)
class Sandwich(Bread):
    """Bread with something on it.

    Args:
        toasted: whether it was, on both sides.
        cheese: what is on it.
    """

    thickness: int = 12
    cheese: str = field(default="none", kw_only=True, metadata=after("thickness"))


@takes(Sandwich)
def make(name: str, options: Sandwich) -> tuple[str, Sandwich]:
    """Make one.

    Args:
        name: whose it is.
        options: as `Sandwich` has them,
            all of them.

    Returns:
        It.
    """
    return name, options


class Lunch:
    """What is eaten at noon.

    Example::

        Lunch(3)
    """

    @takes(Sandwich)
    def __init__(self, options: Sandwich) -> None:
        self.options = options


def test_signatures_show_each_option():
    assert (
        str(inspect.signature(Lunch)) == "(thickness: int = 12, *, cheese: str = 'none', toasted: bool = False) -> None"
    )
    assert list(inspect.signature(make).parameters) == ["name", "thickness", "cheese", "toasted"]
    assert typing.get_type_hints(Lunch.__init__) == {
        "thickness": int,
        "cheese": str,
        "toasted": bool,
        "return": type(None),
    }


def test_the_function_gets_all_options_as_one():
    assert make("Ann", 3, cheese="brie") == ("Ann", Sandwich(3, cheese="brie"))
    assert make(name="Ann") == ("Ann", Sandwich())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (make, r"make\(\) missing a required argument: 'name'"),
        (lambda: make("Ann", chese="brie"), r"make\(\) got an unexpected keyword argument 'chese'"),
        (lambda: Lunch(3, "brie"), r"Lunch.__init__\(\) too many positional arguments"),
    ],
)
def test_wrong_arguments_are_told_by_the_name_of_the_function(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_only_by_keyword():
    made = takes(Bread, keyword_only=True)(lambda name, options: options)
    assert made("Ann", thickness=2) == Bread(2)
    with pytest.raises(TypeError, match="too many positional arguments"):
        made("Ann", 2)


TEXTS = """\
    thickness: of a slice,
        in mm.
    cheese: what is on it.
    toasted: whether it was, on both sides.
"""


def test_docstrings_have_each_text_once_and_in_order():
    assert make.__doc__ == f"Make one.\n\nArgs:\n    name: whose it is.\n{TEXTS}\nReturns:\n    It."
    assert Lunch.__doc__ == f"What is eaten at noon.\n\nArgs:\n{TEXTS}\nExample::\n\n    Lunch(3)"
    assert with_args(None, Bread).startswith("Args:\n    thickness: of a slice,\n")


def test_a_field_without_a_text_is_an_error():
    @dataclass(frozen=True)
    class Untold(Bread):
        """Untold.

        Args:
            jam: what else.
        """

        jam: str = ""
        butter: str = ""

    with pytest.raises(TypeError, match="the docstring of Untold says nothing of butter under Args"):
        texts_of(Untold)


def test_options_are_attributes_that_stay_checked():
    lunch = Lunch(3, toasted=True)
    assert (lunch.thickness, lunch.cheese, lunch.toasted) == (3, "none", True)
    before = lunch.options
    lunch.thickness *= 2
    assert lunch.options == Sandwich(6, toasted=True)
    assert before.thickness == 3
    with pytest.raises(ValueError, match="thickness=0; a slice has at least 1"):
        lunch.thickness = 0
    assert lunch.thickness == 6
    with pytest.raises(FrozenInstanceError):
        lunch.options.thickness = 1


def test_copies_and_pickles_keep_them():
    lunch = Lunch(3)
    for other in (copy.deepcopy(lunch), pickle.loads(pickle.dumps(lunch))):
        assert other.options == lunch.options and other.thickness == 3


def test_subclasses_may_take_other_arguments():
    class Quick(Lunch):
        def __init__(self):
            super().__init__(1)

    assert Quick().thickness == 1
    assert [one.name for one in ordered_fields(Sandwich)] == ["thickness", "cheese", "toasted"]


def test_command_lines_show_each_option_with_its_text(capsys):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Lunch, "lunch")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--lunch.thickness THICKNESS of a slice, in mm. (type: int, default: 12)" in shown
    assert "--lunch.cheese CHEESE what is on it. (type: str, default: none)" in shown
    given = parser.parse_args(["--lunch.cheese", "brie"]).lunch
    assert Lunch(**vars(given)).options == Sandwich(cheese="brie")


@pytest.mark.slow  # mypy reads torch's types
def test_type_checkers_see_each_option(tmp_path):
    pytest.importorskip("mypy")
    path = tmp_path / "checked.py"
    path.write_text(
        textwrap.dedent(
            """
            from collections.abc import Iterable
            from dataclasses import dataclass
            from typing import Any, TypeVar
            from torch import nn
            from lq.options import takes

            M = TypeVar("M", bound=nn.Module)
            T = TypeVar("T")

            @dataclass(frozen=True)
            class Options:
                bits: int = 8

            @takes(Options)
            def same(value: T, options: Options) -> T:
                return value

            text: str = same("a", bits=3)
            number: int = same("a")
            same("a", bitz=3)
            same("a", bits="3")

            @takes(Options)
            def attach(model: M, options: Options) -> M:
                return model

            @takes(Options, keyword_only=True)
            def fit(model: nn.Module, batches: Iterable[Any], options: Options) -> float:
                return 0.5

            layer: nn.Linear = attach(nn.Linear(2, 2), 3)
            layer = attach(model=layer, bits=3)
            loss: float = fit(layer, [1], bits=3)
            loss = fit(model=layer, batches=[1])
            attach(modle=layer)
            fit(layer, batches=[1], bits="3")
            """
        ),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.split("error: ")[1] for line in done.stdout.splitlines() if "error: " in line]
    assert len(errors) == 5, done.stdout + done.stderr
    assert 'expected "int"' in errors[0] or "Incompatible types in assignment" in errors[0]
    assert 'Unexpected keyword argument "bitz" for "same"' in errors[1]
    assert 'Argument "bits" to "same" has incompatible type "str"; expected "int"' in errors[2]
    assert 'Unexpected keyword argument "modle"' in errors[3]
    assert 'Argument "bits"' in errors[4] and 'has incompatible type "str"; expected "int"' in errors[4]
