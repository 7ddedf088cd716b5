"""``lq show`` and ``lq export``: packed files and checkpoints in, files for other programs out.

For example::

lq show model.safetensors
lq export model.safetensors --model resnet18 --output model.onnx
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from lq.attachment.checkpoint import part_of, read_state_dict
from lq.cli.models import built, example
from lq.cli.usage import Parser
from lq.errors import DataError
from lq.export import FORMATS
from lq.export.formats import endings_with
from lq.export.loading import load
from lq.export.onnx import Dynamic
from lq.export.packed import SUFFIX, read_index
from lq.files import named, require_file
from lq.quantizer.targets import TARGETS


def show(name: str, arguments: list[str]) -> str:
    """What a packed file holds."""
    parser = Parser(prog=f"lq {name}", description="What a packed file holds.")
    parser.add_argument("source", type=Path, help="a packed file")
    return _show(parser.parse_args(arguments))


def export(name: str, arguments: list[str]) -> str:
    """Write a quantized model as ONNX, torch.export program or packed file; what was written."""
    parser = Parser(
        prog=f"lq {name}", description="Write a quantized model as ONNX, torch.export program or packed file."
    )
    parser.add_argument(
        "source", type=Path, help="a packed file, or a checkpoint of a quantized model or of a module that holds it"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="name of a timm model, or module:function that builds the float one; a module of this folder, too",
    )
    parser.add_argument(
        "--part", metavar="NAME", help="name of the model in the checkpoint, such as net; by default the one that fits"
    )
    parser.add_argument("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="such as num_classes=10")
    parser.add_argument("--output", type=Path, required=True, help=f"file ending in one of {', '.join(FORMATS)}")
    parser.add_argument("--input-size", nargs="+", type=int, metavar="N", help="of one sample, such as 3 224 224")
    parser.add_argument(
        "--opset", type=int, help="version of ONNX's operators, from 13 on; 21, or 25 for weights of 2 bits"
    )
    parser.add_argument(
        "--target", choices=list(TARGETS), help="engine that the ONNX file is for; what it does not run is an error"
    )
    parser.add_argument(
        "--dynamic",
        nargs="*",
        choices=get_args(Dynamic),
        help="dimensions of the ONNX file that are free: batch (the default), height, width",
    )
    parser.add_argument("--input-names", nargs="+", metavar="NAME", help="of the ONNX file; else of the parameters")
    parser.add_argument("--output-names", nargs="+", metavar="NAME", help="of the ONNX file")
    return _export(parser.parse_args(arguments))


def _show(options: argparse.Namespace) -> str:
    index, _ = read_index(options.source)
    weights = [grid for grid in index.grids if grid.codes is not None]
    widths: Counter[int] = Counter()
    for grid in weights:
        widths.update(grid.codes_by_width)
    codes, others = sum(grid.sizes[1] for grid in weights), sum(other.size for other in index.others)
    listed = ", ".join(f"{count} of {width} bits" for width, count in sorted(widths.items()))
    entries = len(list(index.keys())) + len(index.aliases)
    return "\n".join(
        [
            f"{options.source}: {options.source.stat().st_size} bytes",
            f"{len(weights)} quantized weights, {codes} bytes: {listed}",
            f"{len(index.grids) - len(weights)} ranges of activations",
            f"{len(index.others)} tensors that are not quantized, {others} bytes",
            f"{entries} entries in the state dict",
        ]
    )


def _export(options: argparse.Namespace) -> str:
    output: Path = options.output
    kind = FORMATS.get(output.suffix)
    if kind is None:
        raise DataError(f"--output {output}: the name should end in one of {', '.join(FORMATS)}")
    given = {name: getattr(options, name) for one in FORMATS.values() for name in one.options}
    given = {name: value for name, value in given.items() if value is not None}
    for name in (name for name in given if name not in kind.options):
        said = f"--{name.replace('_', '-')} is for files ending in {endings_with(name)}"
        raise DataError(f"{said}, not --output {output}")
    model, part = loaded(options)
    note = f"{options.source}: took its part {part!r}\n" if part else ""
    examples = [_example(model, options)] if kind.needs_example else []
    return f"{note}{kind.write(model, examples, output, **given)}"


def loaded(options: Any) -> tuple[nn.Module, str]:
    """The quantized model, and the name of the part of the checkpoint that it is.

    Args:
        options: those of a command, with its `source`, `model`, `model_args` and `part`.
    """
    source = Path(options.source)
    if source.suffix == SUFFIX:
        require_file(source)  # before a model is built
        return load(source, built(options.model, options.model_args), part=options.part).eval(), ""
    state_dict = read_state_dict(source)
    model = built(options.model, options.model_args)
    with named(source):
        try:
            part = part_of(state_dict, model) if options.part is None else options.part
        except DataError as error:
            raise DataError(str(error).replace("choose one by part=", "choose one by --part")) from error
        return load(state_dict, model, part=part).eval(), part


def _example(model: nn.Module, options: argparse.Namespace) -> Tensor:
    return example(model, f"--model {options.model}", options.input_size)
