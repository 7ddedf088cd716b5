"""The entry of the command: which commands there are, and what its exit code says.

A command is a function of a list of arguments that returns the text to print (or None), under its name in `COMMANDS`.
It is imported when it is called, so that ``lq show`` does not wait for Lightning. Exit codes: 0 all went well, 2 wrong
arguments, files or data (an `LqError`), 1 any other error; errors are one line on stderr.
"""

import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from lq.cli.usage import one_line, suggestion
from lq.errors import LqError


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        place: the function that runs it, as ``module:name``; called with the name of the command and its arguments.
        help: what it does, in a line.
    """

    place: str
    help: str


COMMANDS = {
    "fit": Command("lq.cli.training:run", "quantize a model by a recipe: after training, or with more of it"),
    "validate": Command("lq.cli.training:run", "measure a model, or a checkpoint, on validation data"),
    "test": Command("lq.cli.training:run", "measure a model, or a checkpoint, on test data"),
    "predict": Command("lq.cli.training:run", "predict with a model, or a checkpoint"),
    "recipes": Command("lq.cli.recipes:run", "list the recipes, or print one with other values of its arguments"),
    "inspect": Command("lq.cli.inspecting:run", "what can be quantized in a model, or what is"),
    "sensitivity": Command("lq.cli.analysis:sensitivity", "what each width of each layer costs, on your data"),
    "allocate": Command("lq.cli.analysis:allocate", "loss against size for several budgets, without training"),
    "compare": Command("lq.cli.comparing:run", "which layers of a quantized model lose most, and what to try next"),
    "report": Command("lq.cli.reporting:run", "write the page of a saved report again"),
    "show": Command("lq.cli.files:show", "what a packed file holds"),
    "export": Command("lq.cli.files:export", "write a quantized model as ONNX, torch.export program or packed file"),
}

#: With this environment variable set, errors come with their traceback.
TRACEBACK = "LQ_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what stands behind ``lq``; by default what the program was called with.

    Returns:
        The exit code: 0 if all went well, 2 for wrong arguments, files or data, 1 for other errors.

    Raises:
        SystemExit: after help (0) and for arguments that a parser does not know (2).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(_help())
        raise SystemExit(0)
    if name == "--version":
        from lq import __version__

        print(f"lq {__version__}")
        return 0
    if name not in COMMANDS:
        wrong = f"invalid choice: {name!r}{suggestion(name, COMMANDS)}" if name else ""
        print(f"lq: {wrong or 'the following arguments are required: command'}; see lq --help", file=sys.stderr)
        raise SystemExit(2)
    return _run(name, given[1:])


def _run(name: str, arguments: list[str]) -> int:
    module, _, function = COMMANDS[name].place.partition(":")
    try:
        text = getattr(importlib.import_module(module), function)(name, arguments)
    except Exception as error:  # noqa: BLE001  # of the user's own code, too
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        known = _known(error)
        text = one_line(error if known is None else known)
        if known is None:
            text = f"{type(error).__name__}: {text} ({TRACEBACK}=1 shows where)"
        print(f"lq {name}: {text}", file=sys.stderr)
        return 1 if known is None else 2
    if text is not None:
        print(text)
    return 0


def _known(error: BaseException) -> BaseException | None:
    """The error of lq, or of a file, that an error is or was made from; parsers wrap what constructors raise."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, LqError):
        found = found.__cause__
    return found or (error if isinstance(error, OSError) else None)


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items())
    return textwrap.dedent(
        """\
        usage: lq [-h] [--version] command ...

        Quantization for models trained with PyTorch Lightning.

        {listed}

        lq COMMAND --help says more. For example:
          lq fit --model.name resnet18 --model.pretrained true --data ImageFolderData --data.folder photos \\
              --recipe qdrop --recipe.weights 4 --trainer.max_epochs 0
          lq export checkpoint.ckpt --model resnet18 --output resnet18.onnx

        Exit codes: 0 all went well, 2 wrong arguments, files or data, 1 other errors; LQ_TRACEBACK=1 shows where."""
    ).format(listed=listed)
