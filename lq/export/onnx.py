"""ONNX files: integer weights of 2, 4 or 8 bits, quantize and dequantize nodes, checked against the model.

Activations of fewer than 8 bits are 8-bit integers limited by a Min, weights of other widths take the next larger type.
"""

import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lq.errors import DataError, StateError
from lq.export.graph import OPSET, OPSET_OF_INT2, Graph
from lq.export.integers import integer_weights, quantized_weights
from lq.export.opsets import NEWEST_LOWERED, OLDEST, lowered
from lq.export.program import Example, exported
from lq.export.running import compare
from lq.export.standard import standard_form
from lq.files import whole_file
from lq.sites import activation_quantizers, weights_at_calls


@dataclass(frozen=True)
class OnnxReport:
    """What was exported, and how the file's outputs differ from the model's.

    Args:
        path: the file.
        size: its bytes.
        opset: version of ONNX's operators.
        weights: number of weights by the type that they are stored as.
        samples: how many samples were compared in onnxruntime; 0: it is not installed, or the check was not asked for.
        largest_difference: largest absolute difference of outputs.
        largest_output: largest absolute output of the model.
        agreement: share of positions with the same largest output along dimension 1; None: outputs have one dimension.
        products: convolutions and matrix products that onnxruntime computes; None: it was not run.
        integer_products: those of them that it computes in integers.
        notes: what is not as in the model, and why.
    """

    path: str
    size: int
    opset: int
    weights: dict[str, int]
    samples: int
    largest_difference: float | None
    largest_output: float | None
    agreement: float | None
    products: int | None
    integer_products: int | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.weights.items())
        lines = [f"{self.path}: {self.size / 1e6:.2f} MB, opset {self.opset}, weights: {kinds or 'all float'}"]
        if self.samples:
            same = "" if self.agreement is None else f", same top-1 on {100 * self.agreement:.2f} %"
            lines.append(
                f"onnxruntime on {self.samples} samples: outputs differ by up to {self.largest_difference:.3g} "
                f"(largest output {self.largest_output:.3g}){same}"
            )
            lines.append(
                f"in integers there: {self.integer_products} of {self.products} convolutions and matrix products"
            )
        return "\n".join([*lines, *self.notes])


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    check: bool | Iterable[Example] = True,
    opset: int | None = None,
) -> OnnxReport:
    """Write a quantized model as ONNX, for batches of any size, and compare it with the model in onnxruntime.

    BatchNorms behind a convolution that training left unfolded are folded into its steps, where its levels fit 8 bits;
    a level of -128 whose sign they turn becomes -127, in `model` as well.
    For integer kernels throughout, quantize with ``integer=True`` (see `lq.attach`). Such kernels have biases that are
    multiples of the product of their steps: those of convolutions and of linear layers on matrices are rounded to them,
    in `model` as well, so that it says what the file says. A report of what differs is written beside the file, as
    ``<name>.report.json``.

    Args:
        model: a model whose quantizers have their ranges.
        example: what it is called with: a batch, a tuple of arguments, or a dict of keyword arguments.
        path: the file.
        check: whether to run the file in onnxruntime on the example, or further batches to run it on.
        opset: version of ONNX's operators; None: 21, and 25 for weights of 2 bits. Weights of more than 4 bits, and
            activations of any width, can go down to 13.

    Raises:
        StateError: if the model has no quantizers, one of them no range, widths are still being learned, or a package
            is missing (``pip install lq-lightning[export]``).
        DataError: if torch cannot export the model, if it needs a later opset, or if onnxruntime cannot run the file;
            no file is written.
    """
    onnx = _require("onnx")
    _require("onnxscript")
    path = Path(path)
    standard = standard_form(model)
    program, reason = exported(standard, example)
    if program is None:
        raise DataError(f"torch.export cannot export {type(model).__name__}: {reason}")
    notes = [f"the batch size is fixed: {reason}"] if reason else []
    notes += _notes(model)
    opset = _opset(model, opset)
    of_torch = max(opset, NEWEST_LOWERED)
    try:
        made = torch.onnx.export(program, dynamo=True, opset_version=of_torch, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"torch.onnx cannot export {type(model).__name__}: {cause}") from error
    proto = made.model_proto  # type: ignore[union-attr]
    if of_torch not in [found.version for found in proto.opset_import if found.domain == ""]:
        raise DataError(f"opset={opset} is not one that torch {torch.__version__} exports")
    graph = Graph(proto)
    graph.optimize(two_bits=opset >= OPSET_OF_INT2, four_bits=opset >= OPSET)
    graph.write()
    if opset < OPSET:
        lowered(proto, opset)
    proto.producer_name = "lq"
    onnx.checker.check_model(proto, full_check=True)
    with whole_file(path) as unfinished, _taken_over(model, graph, notes):
        onnx.save(proto, unfinished)
        batches = [example] if check is True else [] if check is False else list(check)
        run = compare(model, unfinished, batches)
        size = unfinished.stat().st_size
    measured = asdict(run) | {"notes": (*notes, *run.notes)}
    report = OnnxReport(str(path), size, opset, dict(graph.stored), **measured)
    with whole_file(path.with_suffix(".report.json")) as unfinished:
        unfinished.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return report


def _opset(model: nn.Module, opset: int | None) -> int:
    """The opset that was asked for, if it has the types of the weights; by default the first that has."""
    widths = {name: int(weight.bits.max()) for name, weight in integer_weights(model).items()}
    if opset is None:
        return OPSET_OF_INT2 if any(bits <= 2 for bits in widths.values()) else OPSET
    if opset < OLDEST:
        raise DataError(f"opset={opset}: steps for each channel need {OLDEST} or more")
    few = [name for name, bits in widths.items() if bits <= 4]
    if opset < OPSET and few:
        listed = ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
        raise DataError(
            f"opset={opset}: types of 4 bits need {OPSET} or more, those of 2 bits {OPSET_OF_INT2}; {listed} would be "
            "stored in 8 bits: quantize them to more than 4 bits, or choose a later opset"
        )
    return opset


@contextmanager
def _taken_over(model: nn.Module, graph: Graph, notes: list[str]) -> Iterator[None]:
    """Give the model the biases that were rounded and weights that were moved; they go back if something fails."""
    ours = {name: p for name, p in model.named_parameters() if name in graph.biases or name in graph.moved}
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    with torch.no_grad():
        for name, parameter in ours.items():
            if name in graph.biases:
                parameter.copy_(torch.from_numpy(graph.biases[name]))
            else:
                which, values = map(torch.from_numpy, graph.moved[name])
                parameter[which.to(parameter.device)] = values.to(parameter)
        biases = {name: float((ours[name] - before[name]).abs().max()) for name in ours if name in graph.biases}
    if farthest := max(biases.values(), default=0.0):
        notes.append(
            f"{len(biases)} biases were rounded to products of steps, in the model too, by up to {farthest:.2g}"
        )
    if graph.moved:
        count = sum(len(values) for _, values in graph.moved.values())
        notes.append(f"{count} weights of level -128 became -127, in the model too: a BatchNorm turns their sign")
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, old in before.items():
                ours[name].copy_(old)
        raise


def _notes(model: nn.Module) -> list[str]:
    """What a reader of the file has to know."""
    notes = []
    widths = Counter(int(q.bits) for q in activation_quantizers(model).values())
    narrow = {bits: count for bits, count in sorted(widths.items()) if bits not in (8, 16)}
    if narrow:
        listed = ", ".join(f"{count} of {bits} bits" for bits, count in narrow.items())
        notes.append(f"activations with other widths than 8 are 8-bit integers, limited to their levels: {listed}")
    if widths[16]:
        notes.append(f"{widths[16]} activations of 16 bits: onnxruntime computes what reads them in float")
    if not widths:
        notes.append("weights only: onnxruntime may round inputs of matrix products to 8 bits by itself")
    if not any(True for _ in quantized_weights(model)):
        notes.append("activations only: onnxruntime may round float weights between them by itself")
    functions = sum(1 for _ in weights_at_calls(model))
    if functions:
        notes.append(
            f"{functions} weights of functions (such as nn.MultiheadAttention) are stored in float and rounded"
        )
    return notes


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise StateError(f"ONNX export needs {name}; pip install 'lq-lightning[export]'") from error
