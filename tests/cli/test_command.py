"""The entry of the command: help, version, misspelt names, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lq
from lq.cli import command, main
from lq.errors import DataError

ROOT = Path(__file__).parents[2]


def fails(name, arguments):
    raise {"lq": DataError, "file": OSError, "other": KeyError}[arguments[0]]("out of\norder")


def wraps(name, arguments):
    try:
        raise DataError("what it is about")
    except DataError as error:
        raise RuntimeError("of a parser") from error


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setitem(command.COMMANDS, "fail", command.Command(f"{__name__}:fails", ""))
    monkeypatch.setitem(command.COMMANDS, "wrap", command.Command(f"{__name__}:wraps", ""))


def test_help_lists_every_command(capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as stopped:
            main([flag])
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: lq")
        assert all(f"\n  {name} " in said and found.help in said for name, found in command.COMMANDS.items())


def test_every_command_is_there():
    import importlib

    for found in command.COMMANDS.values():
        module, _, function = found.place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lq {lq.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "lq: the following arguments are required: command; see lq --help\n"),
        (["recpies"], "lq: invalid choice: 'recpies'; did you mean recipes?; see lq --help\n"),
        (["alocate"], "lq: invalid choice: 'alocate'; did you mean allocate, validate?; see lq --help\n"),
        (["zzz"], "lq: invalid choice: 'zzz'; see lq --help\n"),
        (["show"], "lq show: the following arguments are required: source; see lq show --help\n"),
        (["show", "a", "--checks"], "lq show: unrecognized arguments: --checks; see lq show --help\n"),
        (["inspect", "a", "--jsn", "b"], "lq inspect: unrecognized arguments: --jsn b; did you mean --json?\n"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fail", "lq"], 2, "lq fail: out of order\n"),
        (["fail", "file"], 2, "lq fail: out of order\n"),
        (["fail", "other"], 1, "lq fail: KeyError: 'out of\\norder' (LQ_TRACEBACK=1 shows where)\n"),
        (["wrap"], 2, "lq wrap: what it is about\n"),
    ],
)
def test_exit_codes(arguments, code, message, failing, capsys):
    assert main(arguments) == code
    assert capsys.readouterr() == ("", message)


def test_tracebacks_on_request(failing, capsys, monkeypatch):
    monkeypatch.setenv("LQ_TRACEBACK", "1")
    assert main(["fail", "other"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_small_commands_do_not_wait_for_lightning(tmp_path):
    code = (
        "import sys, lq.cli\nlq.cli.main(['--version'])\nlq.cli.main(['show', 'none.safetensors'])\n"
        "print(*sorted({'lightning', 'timm', 'jsonargparse', 'torchvision'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == f"lq {lq.__version__}\n\n"
    assert done.stderr == "lq show: there is no file none.safetensors\n"
