"""``lq sensitivity`` and ``lq allocate``: what widths cost, and what that allows for several sizes, without training.

Both quantize the model to 8 bits, calibrate it and measure on training images of one of the data modules of
`lq.cli.data`, or of the user's own; nothing is trained and no widths are tried out.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lq.cli.usage import UsageError, one_line, plain, require, suggestion

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
require("jsonargparse", "cli")

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from jsonargparse import ArgumentParser  # noqa: E402
from torch import nn  # noqa: E402
from typing_extensions import override  # noqa: E402

from lq.allocation.allocate import Allocation, Granularity  # noqa: E402
from lq.allocation.allocate import allocate as solve  # noqa: E402
from lq.attachment.attach import attach, set_bits  # noqa: E402
from lq.attachment.folding import fold_batchnorm  # noqa: E402
from lq.attachment.sites import is_attached  # noqa: E402
from lq.attachment.summary import summary  # noqa: E402
from lq.calibration.calibration import calibrate  # noqa: E402
from lq.cli import data as data_modules  # noqa: E402
from lq.cli.inspecting import write  # noqa: E402
from lq.cli.models import built  # noqa: E402
from lq.cli.timm_module import data_config_of, load_weights  # noqa: E402
from lq.errors import BudgetError, DataError  # noqa: E402
from lq.sensitivity import Sensitivity, measure_sensitivity  # noqa: E402
from lq.sensitivity.measure import metric_of  # noqa: E402
from lq.structure.inspection import inspect  # noqa: E402
from lq.tables import Table, amount  # noqa: E402

_DATA = sorted(name for name in vars(data_modules) if name.endswith("Data") and name != "ImageData")


class _Parser(ArgumentParser):
    """A parser of typed arguments whose errors are one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{plain(message)}; see {self.prog} --help") from ex


def sensitivity(name: str, arguments: list[str]) -> str:
    """Measure what each width of each weight and activation costs; the table."""
    parser = _parser(name, "What each width of each weight (and activation) costs, by one pass over training images.")
    parser.add_argument("--activations", type=bool, default=True, help="measure activations, too")
    options = _parsed(parser, arguments)
    _, table = _measured(options, activations=options.activations)
    if options.json is not None:
        write(Path(options.json), table.to_json())
    return str(table)


def allocate(name: str, arguments: list[str]) -> str:
    """Solve for several budgets; the front of loss against size, as a table."""
    parser = _parser(
        name,
        "The least loss for each of several sizes (a Pareto front), by sensitivities and a knapsack, without training.",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=str,
        default=["16x", "10.66x", "8x", "6x", "5x", "4x"],
        help="mean bits (3.0), compression (8x), bytes (1.5MB) or bit operations (2.5GBitOps)",
    )
    parser.add_argument("--granularity", type=Granularity, default="layer", help="one width per layer, or per channel")
    parser.add_argument("--solver", type=str, default="lagrangian", help="greedy, lagrangian or exact")
    parser.add_argument("--bits", nargs="+", type=int, default=None, help="widths to choose from, such as 2 4 8")
    parser.add_argument(
        "--allocations",
        type=str | None,
        default=None,
        help="folder for one JSON file per budget, for AllocateBits(allocation=...)",
    )
    parser.add_argument(
        "--part", type=str, default="model", help="what the model is called in the LightningModule, for --allocations"
    )
    options = _parsed(parser, arguments)
    model, table = _measured(options, activations=False)
    front = list(_front(model, table, options))
    if options.json is not None:
        content = {"model": options.model, "metric": table.metric, "samples": table.samples}
        points = [{**point, "allocation": json.loads(found.to_json())} for point, found in front]
        write(Path(options.json), json.dumps({**content, "front": points}, indent=1))
    if options.allocations is not None:
        Path(options.allocations).mkdir(parents=True, exist_ok=True)
        for point, found in front:
            write(Path(options.allocations) / f"{point['budget']}.json", _under(options.part, found).to_json())
    return str(_table(table, [point for point, _ in front]))


def _front(model: nn.Module, table: Sensitivity, options: Any) -> Iterator[tuple[dict[str, Any], Allocation]]:
    """For each budget what comes of it."""
    for budget in options.budgets:
        try:
            found = solve(
                model,
                table,
                float(budget) if _is_number(budget) else budget,
                solver=options.solver,
                bits=options.bits,
                granularity=options.granularity,
            )
        except BudgetError as error:
            raise BudgetError(f"--budgets {budget}: {one_line(error)}") from error
        set_bits(model, found.weights, found.activations)
        size = summary(model)
        yield (
            {
                "budget": budget,
                "average_bits": size.average_bits,
                "bytes": size.bytes,
                "compression": size.compression,
                "loss": found.loss,
                "bound": found.bound,
            },
            found,
        )


def _under(part: str, found: Allocation) -> Allocation:
    """The allocation for a module that has the model as its submodule `part`."""
    prefix = f"{part}." if part else ""
    weights = {f"{prefix}{name}": bits for name, bits in found.weights.items()}
    return replace(found, weights=weights, activations={f"{prefix}{k}": bits for k, bits in found.activations.items()})


def _table(measured: Sensitivity, points: Sequence[dict[str, Any]]) -> Table:
    header = ("budget", "mean bits", "stored", "smaller", f"expected loss ({measured.metric})", "least possible")
    rows = [
        (
            str(point["budget"]),
            f"{point['average_bits']:.2f}",
            amount(point["bytes"], "B"),
            f"{point['compression']:.2f}x",
            f"{point['loss']:.3e}",
            f"{point['bound']:.3e}",
        )
        for point in points
    ]
    note = f"measured on {measured.samples} samples; AllocateBits(budget=...) writes the widths of a row"
    return Table(header, tuple(rows), (note,))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- model and data ---------------------------------------------------------------------------------------------------


def _parser(name: str, description: str) -> _Parser:
    """The arguments that both commands have."""
    parser = _Parser(prog=f"lq {name}", description=description)
    parser.add_argument("model", type=str, help="name of a timm model, or module:function that builds the float one")
    parser.add_argument(
        "--model-args", nargs="*", type=str, default=[], metavar="KEY=VALUE", help="such as num_classes=10 in_chans=1"
    )
    parser.add_argument("--checkpoint", type=str | None, default=None, help="file of the model's float weights")
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True, help=f"one of {', '.join(_DATA)}")
    parser.add_argument("--samples", type=int, default=512, help="training images to measure on")
    parser.add_argument(
        "--metric", type=str, default="fisher", help="fisher, model_fisher, output_distortion, hawq_v2 or kl"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    parser.add_argument("--device", type=str, default="cpu", help="such as cuda")
    parser.add_argument("--json", type=str | None, default=None, help="file to write it to as JSON")
    return parser


def _parsed(parser: _Parser, arguments: Sequence[str]) -> Any:
    """The options, with the data module built.

    Raises:
        UsageError: for arguments that there are not.
    """
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        chosen = value if equals else after
        if option == "--data" and "." not in chosen and chosen not in _DATA:
            raise UsageError(f"--data {chosen}: there is no such data module{suggestion(chosen, _DATA)}")
    options = parser.instantiate_classes(parser.parse_args(list(arguments)))
    metric_of(options.metric)
    if options.samples < 1:
        raise UsageError(f"--samples {options.samples}: expected 1 or more")
    return options


def _measured(options: Any, *, activations: bool) -> tuple[nn.Module, Sensitivity]:
    """The model, quantized to 8 bits, and what its widths cost."""
    model = built(options.model, options.model_args, "MODEL").eval()
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint)
        if is_attached(model):
            raise DataError(f"{options.checkpoint} is of a quantized model; give the weights of the float one")
    batches = list(_batches(options, model))
    model.to(options.device)
    images = batches[0][0] if isinstance(batches[0], (tuple, list)) else batches[0]
    fold_batchnorm(model, images[:2])
    structure = inspect(model, images[:2])
    attach(model, 8, 8, structure=structure)
    calibrate(model, batches)
    return model, measure_sensitivity(model, batches, options.metric, activations=activations)


def _batches(options: Any, model: nn.Module) -> Iterator[Any]:
    """Training batches with as many images as were asked for, on the device.

    Raises:
        DataError: if there are none, or the model has other classes.
    """
    data: Any = options.data
    if isinstance(data, data_modules.ImageData):
        data.data_config = {**data_config_of(model), **(data.data_config or {})}
    data.prepare_data()
    data.setup("fit")
    if isinstance(data, data_modules.ImageData):
        data.require_classes(getattr(model, "num_classes", None), "--model-args num_classes={count}")
    left = options.samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        for batch in data.train_dataloader():
            moved = pl.utilities.move_data_to_device(batch, torch.device(options.device))
            parts = moved if isinstance(moved, (tuple, list)) else (moved,)
            yield tuple(part[:left] for part in parts)
            left -= len(parts[0])
            if left <= 0:
                return
    if left == options.samples:
        raise DataError("--data: there are no training images")
