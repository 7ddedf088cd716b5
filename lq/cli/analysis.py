"""``lq sensitivity`` and ``lq allocate``: what widths cost, and what that allows for several sizes, without training.

Both quantize the model to 8 bits, calibrate it and measure on training images of one of the data modules of
`lq.cli.data`, or of the user's own; nothing is trained and no widths are tried out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lq.allocation.allocate import Allocation, Granularity
from lq.allocation.allocate import allocate as solve
from lq.attachment.attach import attach, set_bits
from lq.attachment.folding import fold_batchnorm
from lq.attachment.sites import is_attached
from lq.attachment.summary import summary
from lq.calibration.calibration import calibrate
from lq.cli.inspecting import write
from lq.cli.models import built
from lq.cli.sampling import TypedParser, add_data, batches, parsed
from lq.cli.timm_module import load_weights
from lq.cli.usage import one_line, progress
from lq.errors import BudgetError, DataError
from lq.sensitivity import Sensitivity, measure_sensitivity
from lq.sensitivity.measure import METRICS, metric_of
from lq.structure.inspection import inspect
from lq.tables import Table, amount


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


def _parser(name: str, description: str) -> TypedParser:
    """The arguments that both commands have."""
    parser = TypedParser(prog=f"lq {name}", description=description)
    parser.add_argument("model", type=str, help="name of a timm model, or module:function that builds the float one")
    parser.add_argument(
        "--model-args", nargs="*", type=str, default=[], metavar="KEY=VALUE", help="such as num_classes=10 in_chans=1"
    )
    parser.add_argument("--checkpoint", type=str | None, default=None, help="file of the model's float weights")
    add_data(parser, "to measure on", 512)
    parser.add_argument("--metric", type=str, default="fisher", help=f"one of {', '.join(METRICS)}")
    parser.add_argument("--json", type=str | None, default=None, help="file to write it to as JSON")
    return parser


def _parsed(parser: TypedParser, arguments: Sequence[str]) -> Any:
    options = parsed(parser, arguments)
    metric_of(options.metric)
    return options


def _measured(options: Any, *, activations: bool) -> tuple[nn.Module, Sensitivity]:
    """The model, quantized to 8 bits, and what its widths cost."""
    model = built(options.model, options.model_args, "MODEL").eval()
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint)
        if is_attached(model):
            raise DataError(f"{options.checkpoint} is of a quantized model; give the weights of the float one")
    found = list(batches(options, model))
    model.to(options.device)
    images = found[0][0] if isinstance(found[0], (tuple, list)) else found[0]
    fold_batchnorm(model, images[:2])
    structure = inspect(model, images[:2])
    attach(model, 8, 8, structure=structure)
    with progress():
        calibrate(model, found)
        return model, measure_sensitivity(model, found, options.metric, activations=activations)
