"""The command ``lq``: packed files and checkpoints in, files for other programs out.

For example::

lq show model.safetensors
lq export model.safetensors --model resnet18 --output model.onnx
"""

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn

from lq.attachment.checkpoint import part_of, read_state_dict
from lq.errors import DataError, LqError
from lq.export import FORMATS, export_onnx, export_program, save
from lq.export.loading import load
from lq.export.packed import SUFFIX, read_index
from lq.files import named, require_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well, 2 for wrong arguments or files."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except (LqError, OSError) as error:
        print(f"lq {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lq", description="Quantized models: look at them, export them.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a packed file holds")
    show.add_argument("source", type=Path, help="a packed file")
    show.set_defaults(run=_show)
    export = commands.add_parser("export", help="write a quantized model as ONNX, torch.export program or packed file")
    export.add_argument(
        "source", type=Path, help="a packed file, or a checkpoint of a quantized model or of a module that holds it"
    )
    export.add_argument(
        "--model",
        required=True,
        help="name of a timm model, or module:function that builds the float one; a module of this folder, too",
    )
    export.add_argument(
        "--part", metavar="NAME", help="name of the model in the checkpoint, such as net; by default the one that fits"
    )
    export.add_argument("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="such as num_classes=10")
    export.add_argument("--output", type=Path, required=True, help="file ending in .onnx, .pt2 or .safetensors")
    export.add_argument("--input-size", nargs="+", type=int, metavar="N", help="of one sample, such as 3 224 224")
    export.add_argument(
        "--opset", type=int, help="version of ONNX's operators, from 13 on; 21, or 25 for weights of 2 bits"
    )
    export.set_defaults(run=_export)
    return parser


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
    if output.suffix not in FORMATS:
        raise DataError(f"--output {output}: the name should end in one of {', '.join(FORMATS)}")
    model, part = _loaded(options)
    note = f"{options.source}: took its part {part!r}\n" if part else ""
    if output.suffix == ".onnx":
        return f"{note}{export_onnx(model, _example(model, options), output, opset=options.opset)}"
    if output.suffix == ".pt2":
        export_program(model, _example(model, options), output)
    else:
        save(model, output)
    return f"{note}{output}: {output.stat().st_size / 1e6:.2f} MB"


def _loaded(options: argparse.Namespace) -> tuple[nn.Module, str]:
    """The quantized model, and the name of the part of the checkpoint that it is."""
    source: Path = options.source
    if source.suffix == SUFFIX:
        require_file(source)  # before a model is built
        return load(source, _built(options.model, options.model_args), part=options.part).eval(), ""
    state_dict = read_state_dict(source)
    model = _built(options.model, options.model_args)
    with named(source):
        try:
            part = part_of(state_dict, model) if options.part is None else options.part
        except DataError as error:
            raise DataError(str(error).replace("choose one by part=", "choose one by --part")) from error
        return load(state_dict, model, part=part).eval(), part


def _built(name: str, pairs: Sequence[str]) -> nn.Module:
    """The float model."""
    if any("=" not in pair for pair in pairs):
        raise DataError(f"--model-args {' '.join(pairs)}: expected KEY=VALUE")
    place, _, function = name.partition(":")
    try:
        arguments = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
        build = getattr(_module(place), function) if function else _timm(place)
        model = build(**arguments)
    except (Exception, SystemExit) as error:  # what user code raises
        cause = str(error) or type(error).__name__
        raise DataError(f"--model {name}: {cause}; give the name of a timm model, or module:function") from error
    if not isinstance(model, nn.Module):
        raise DataError(f"--model {name} gives a {type(model).__name__}, not a torch module")
    return model


def _module(name: str) -> ModuleType:
    """A module; of the folder the command runs in, if it is nowhere else."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    return importlib.import_module(name)


def _timm(name: str) -> Callable[..., Any]:
    import timm

    return lambda **arguments: timm.create_model(name, **arguments)


def _example(model: nn.Module, options: argparse.Namespace) -> torch.Tensor:
    """Two random samples of the size that was given, or that a timm model was made for."""
    size = options.input_size or getattr(model, "pretrained_cfg", {}).get("input_size")
    given = f"--input-size {' '.join(map(str, size or ()))}"
    if options.input_size and min(options.input_size) < 1:
        raise DataError(f"{given}: expected numbers from 1 on, such as 3 224 224")
    if not size:
        raise DataError(f"--model {options.model} does not say what it takes; give --input-size, such as 3 224 224")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = size[0] if options.input_size or first is None else first.in_channels
    try:
        return torch.randn(2, channels, *size[1:], generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:
        raise DataError(f"{given}: two samples do not fit into memory") from error


if __name__ == "__main__":
    sys.exit(main())
