"""``lq compare``: how far each layer of a quantized model is from the float one, worst first (`lq.compare`).

For example::

    lq compare model.ckpt --model resnet18 --data ImageFolderData --data.folder photos --out layers.csv
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lq.attachment.folding import fold_batchnorm
from lq.cli.files import loaded
from lq.cli.inspecting import write
from lq.cli.models import built
from lq.cli.sampling import TypedParser, add_data, batches, parsed
from lq.cli.timm_module import load_weights
from lq.cli.usage import UsageError
from lq.errors import DataError
from lq.export.packed import SUFFIX
from lq.report.comparison import Comparison, compare, float_reference

# What a comparison is written as, by how the file's name ends.
_WRITERS: dict[str, Callable[[Comparison, Path], object]] = {
    ".csv": Comparison.to_csv,
    ".json": lambda found, path: write(path, found.to_json()),
    ".png": Comparison.plot,
}

# What is said of a packed file that is compared with itself.
_LEVELS = (
    "a packed file holds rounded weights only, which lose nothing by being rounded: give the float ones by --reference"
)


def run(name: str, arguments: list[str]) -> str:
    """The comparison as a table.

    Raises:
        UsageError: for arguments that cannot be.
    """
    parser = TypedParser(
        prog=f"lq {name}",
        description="How far each layer of a quantized model is from the float one, alone and with all before it "
        "quantized, on training images; the worst first, with what to try next. "
        f"For example: lq {name} model.ckpt --model resnet18 --data ImageFolderData --data.folder photos "
        "--out layers.csv",
    )
    parser.add_argument("source", type=str, help="a packed file, or a checkpoint of the quantized model")
    parser.add_argument(
        "--model", type=str, required=True, help="name of a timm model, or module:function that builds the float one"
    )
    parser.add_argument("--part", type=str | None, default=None, help="name of the model in the checkpoint")
    parser.add_argument(
        "--model-args", nargs="*", type=str, default=[], metavar="KEY=VALUE", help="such as num_classes=10 in_chans=1"
    )
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="file of the float weights before reconstruction, training or packing changed them; else those of the "
        "model",
    )
    add_data(parser, "to compare on", 64)
    parser.add_argument("--most", type=int | None, default=None, help="layers to show; all by default")
    parser.add_argument(
        "--out", type=str | None, default=None, help="file to write all layers to, ending in .csv, .json or .png"
    )
    options = parsed(parser, arguments)
    out = None if options.out is None else Path(options.out)
    if out is not None and out.suffix not in _WRITERS:
        raise UsageError(f"--out {out}: the name should end in one of {', '.join(_WRITERS)}")
    if options.most is not None and options.most < 1:
        raise UsageError(f"--most {options.most}: expected 1 or more")
    model, _ = loaded(options)
    given = list(batches(options, model))
    model.to(options.device)
    found = compare(model, given, reference=_reference(model, options, given[0]))
    if options.reference is None and Path(options.source).suffix == SUFFIX:
        found = replace(found, notes=(*found.notes, _LEVELS))
    if out is not None:
        _WRITERS[out.suffix](found, out)
    return str(found.table(options.most))


def _reference(model: nn.Module, options: Any, batch: Any) -> nn.Module | None:
    """The model with the float weights of a file; its BatchNorms are folded if those of the model are.

    Raises:
        DataError: if the file is of another model.
    """
    if options.reference is None:
        return None
    floats = built(options.model, options.model_args).eval()
    load_weights(floats, options.reference)
    try:
        return float_reference(model, floats.state_dict())
    except DataError:
        fold_batchnorm(floats, (batch[0] if isinstance(batch, (tuple, list)) else batch)[:2].cpu())
        return float_reference(model, floats.state_dict())
