"""The kinds of files that a quantized model is exported as, by how their names end.

`lq.callbacks.ExportModel` and ``lq export`` write what is in `FORMATS`; each kind has a file of its own in this folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lq.export.onnx import OnnxReport, export_onnx
from lq.export.packed import save
from lq.export.program import Example, export_program, first_samples


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        name: what files of it are called.
        write: called with a model, examples of what the model is called with, a path and options by name; writes the
            file and returns what is said of it.
        options: names of the options that it takes; `ExportModel` and ``lq export`` have arguments of these names.
        needs_example: whether it is given at least one example; else there may be none.
    """

    name: str
    write: Callable[..., OnnxReport | str]
    options: tuple[str, ...] = ()
    needs_example: bool = True


def _onnx(model: nn.Module, examples: Sequence[Example], path: Path, **options: Any) -> OnnxReport:
    return export_onnx(model, first_samples(examples[0]), path, check=examples, **options)


def _program(model: nn.Module, examples: Sequence[Example], path: Path) -> str:
    export_program(model, first_samples(examples[0]), path)
    return _size(path)


def _packed(model: nn.Module, examples: Sequence[Example], path: Path) -> str:
    save(model, path)
    return _size(path)


def _size(path: Path) -> str:
    return f"{path}: {path.stat().st_size / 1e6:.2f} MB"


#: How names of exported files end, and what such files are.
FORMATS = {
    ".onnx": Format("ONNX", _onnx, ("opset", "target", "dynamic", "input_names", "output_names")),
    ".pt2": Format("program", _program),
    ".safetensors": Format("packed", _packed, needs_example=False),
}


def endings_with(option: str) -> str:
    """How names of the files end that take an option."""
    return ", ".join(ending for ending, kind in FORMATS.items() if option in kind.options)
