"""ONNX files: integer weights of 2, 4 or 8 bits, quantize and dequantize nodes, checked against the model.

Activations of fewer than 8 bits are 8-bit integers limited by a Clip; weights of other widths take the next larger
type.
"""

import copy
import importlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq.attachment.sites import activation_quantizers, quantizers
from lq.attachment.stored import stay_float
from lq.attachment.targets import check_model
from lq.bars import at, staged
from lq.errors import DataError, SpecError, StateError
from lq.export.engines import with_signed_codes
from lq.export.graph import OPSET, OPSET_OF_INT2, Graph
from lq.export.integers import integer_weights
from lq.export.naming import name_dimensions, rename
from lq.export.opsets import NEWEST_LOWERED, OLDEST, lowered
from lq.export.program import (
    IMAGES,
    Example,
    arguments,
    batch_length,
    exported,
    first_line,
    groups_by_sample,
    in_float32,
    one_at_a_time,
    pieces,
)
from lq.export.running import can_read, compare
from lq.export.standard import standard_form
from lq.files import whole_file
from lq.quantizer.targets import Target, TargetName, listed, target_of

#: Dimensions that may have other sizes than in the example: of all inputs, and of images.
Dynamic = Literal["batch", "height", "width"]


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
        products: convolutions and matrix products that onnxruntime computes; None: it was not run, or the file is for
            another engine.
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
        if self.products is not None:
            lines.append(
                f"in integers there: {self.integer_products} of {self.products} convolutions and matrix products"
            )
        return "\n".join([*lines, *self.notes])


@one_at_a_time
@staged("Exporting", "translating", "simplifying", "checking")
def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    check: bool | Iterable[Example] = True,
    opset: int | None = None,
    target: TargetName | None = None,
    dynamic: Dynamic | Sequence[Dynamic] = "batch",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxReport:
    """Write a quantized model as ONNX, for batches of any size, and compare it with the model in onnxruntime.

    BatchNorms behind a convolution that training left unfolded are folded into its steps, where its levels fit 8 bits;
    a level of -128 whose sign they turn becomes -127, in `model` as well. A model in bfloat16 or float64
    (``precision="bf16-true"``) is exported as its copy in float32: engines have few operators of those types.
    For integer kernels throughout, quantize with ``integer=True`` (see `lq.attach`). Such kernels have biases that are
    multiples of the product of their steps: those of convolutions and of linear layers on matrices are rounded to them,
    in `model` as well, so that it says what the file says. A report of what differs is written beside the file, as
    ``<name>.report.json``.

    Args:
        model: a model whose quantizers have their ranges.
        example: what it is called with: a batch, a tuple of arguments, or a dict of keyword arguments.
        path: the file.
        check: whether to run the file in onnxruntime on the example, or further batches to run it on.
        opset: version of ONNX's operators; None: that of the target, else 21, and 25 for weights of 2 bits where
            onnxruntime can read that. Weights of more than 4 bits, and activations of any width, can go down to 13.
        target: the engine that the file is for: "onnxruntime", "openvino" or "tensorrt" (by its documents, not tried);
            None: written as for onnxruntime, without a look at what the engine does not run (`lq.quantizer.targets`).
        dynamic: the dimensions that are free, one or a list: "batch" (of all inputs, where the model allows that),
            "height", "width" (of images; an error where it does not). An empty list fixes all.
        input_names: names of the file's inputs, in order; by default those of the parameters.
        output_names: names of its outputs, in order; by default those that torch gives.

    Raises:
        SpecError: for an unknown target, or a model that it does not run.
        StateError: if the model has no quantizers, one of them no range, widths are still being learned, or a package
            is missing (``pip install lq-lightning[export]``).
        DataError: if torch cannot export the model, if it needs a later opset, or if onnxruntime cannot run the file;
            no file is written.
    """
    onnx = _require("onnx")
    _require("onnxscript")
    path = Path(path)
    engine, free = target_of(target), _checked(dynamic, example)
    kinds = other_types(model)
    standard = standard_form(copy.deepcopy(model).float() if kinds else model)
    if engine is not None:
        check_model(model, engine)
    needed = _opset(model, opset, engine)
    in_four_bits = opset is None and needed > OPSET and not can_read(needed)
    opset = OPSET if in_four_bits else needed
    of_torch = max(opset, NEWEST_LOWERED)
    example_of_file = in_float32(example) if kinds else example
    made, reason = _translated(standard, example_of_file, of_torch, type(model).__name__, free)
    samples = batch_length(example) if reason or "batch" not in free else None
    notes = [f"the batch size is fixed: {reason}; it is the example's, {samples} (example=)"] if reason else []
    notes += [f"the file computes in float32, where the model does in {kinds}"] if kinds else []
    if in_four_bits:
        notes.append(f"weights of 2 bits are stored in 4: this onnxruntime cannot read opset {needed}")
    notes += _notes(model, engine)
    proto = made.model_proto
    if of_torch not in [found.version for found in proto.opset_import if found.domain == ""]:
        raise DataError(f"opset={opset} is not one that torch {torch.__version__} exports")
    at("simplifying")
    graph = _written(proto, opset, engine)
    parameters = [value.name for value in proto.graph.input]
    rename(proto, input_names, output_names)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # of several classes, none of them public
        raise DataError(f"torch.onnx makes an invalid file of {type(model).__name__}: {first_line(error)}") from error
    if left := graph.with_float_inputs():
        notes.append(
            f"inputs of {listed(left)} are float: onnxruntime may round them to 8 bits by itself; "
            "with activations=8, integer=True they are rounded in the model too; to keep them float, run the file with "
            'the session option "session.qdq_matmulnbits_accuracy_level" of "1"'
        )
    at("checking")
    with _taken_over(model, graph, notes), whole_file(path) as unfinished:
        onnx.save(proto, unfinished)
        batches = [example] if check is True else [] if check is False else list(check)
        run = compare(model, unfinished, batches if samples is None else pieces(batches, samples), parameters)
        size = unfinished.stat().st_size
    measured = asdict(run) | {"notes": (*notes, *run.notes)}
    if engine is not None and engine.name != "onnxruntime":  # what it computes in integers is no news of others
        measured |= {"products": None, "integer_products": None, "notes": tuple(notes)}
    report = OnnxReport(str(path), size, opset, dict(graph.stored), **measured)
    with whole_file(path.with_suffix(".report.json")) as unfinished:
        unfinished.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return report


def _checked(dynamic: Dynamic | Sequence[Dynamic], example: Example) -> Sequence[Dynamic]:
    """The free dimensions that were asked for, if there are such.

    Raises:
        SpecError: for names that there are not.
        DataError: if the example has no images.
    """
    known = get_args(Dynamic)
    free: Sequence[Dynamic] = (dynamic,) if isinstance(dynamic, str) else dynamic
    if not set(free) <= set(known):
        raise SpecError(f"dynamic={dynamic!r}: expected one of {', '.join(known)}, or a list of them")
    shapes = [x.ndim for x in tree_leaves(arguments(example)) if isinstance(x, Tensor)]
    if set(free) - {"batch"} and IMAGES not in shapes:
        raise DataError(
            f"dynamic={list(free)}: no input has {IMAGES} dimensions, samples, channels, height and width; "
            "leave height and width out"
        )
    return free


def _translated(
    standard: nn.Module, example: Example, opset: int, name: str, free: Sequence[Dynamic]
) -> tuple[Any, str]:
    """The model in ONNX's operators, for batches of any size if it can be; and why it cannot."""
    sizes = [dimension for dimension in free if dimension != "batch"]
    program, reason = exported(standard, example, free)
    while program is not None:
        try:
            with _quiet():
                return torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False), reason
        except torch.onnx.OnnxExporterError as error:
            cause = first_line(error.__cause__ or error)
            if reason or "batch" not in free:  # already for one batch size
                raise DataError(f"torch.onnx cannot export {name}: {cause}") from error
            by_sample = groups_by_sample(program)
            program, cannot = exported(standard, example, sizes)
            reason = cannot or ("a convolution has a group for each sample" if by_sample else cause)
    which = f" for images of any {' and '.join(sizes)}" if sizes else ""
    more = "; give a larger example, on which no size on the way is 1, or leave them out of dynamic=" if sizes else ""
    raise DataError(f"torch.export cannot export {name}{which}: {reason}{more}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hundreds of lines of the exporter's parts, which show where the root logger does (as with Hydra)."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _written(proto: Any, opset: int, target: Target | None) -> Graph:
    """The graph after all that makes it one of integers, in that opset, for that engine; `proto` is changed."""
    graph = Graph(proto)
    least = 2 if opset >= OPSET_OF_INT2 else 4 if opset >= OPSET else 8
    if target is None:
        graph.optimize(least_stored=least)
    else:
        least = max(least, target.least_stored)
        graph.optimize(least_stored=least, as_read=target.as_read, integer_biases=not target.signed)
    graph.write()
    if opset < OPSET:
        lowered(proto, opset)
    if target is not None and target.signed:
        with_signed_codes(proto, target)
    name_dimensions(proto)
    proto.producer_name = "lq"
    return graph


def _opset(model: nn.Module, opset: int | None, target: Target | None) -> int:
    """The opset that was asked for, if it has the types of the weights; by default the first that has."""
    widths = {name: int(weight.bits.max()) for name, weight in integer_weights(model).items()}
    if opset is None and target is not None and target.opset is not None:
        return target.opset
    if opset is None:
        return OPSET_OF_INT2 if any(bits <= 2 for bits in widths.values()) else OPSET
    if opset < OLDEST:
        raise DataError(f"opset={opset}: steps for each channel need {OLDEST} or more")
    if target is not None and opset > target.opsets[1]:
        raise DataError(f"opset={opset}: target={target.name!r} reads {' to '.join(map(str, target.opsets))}")
    if opset > (newest := _require("onnx").defs.onnx_opset_version()):
        raise DataError(f"opset={opset}: the newest that this version of onnx knows is {newest}")
    in_eight = target is not None and target.least_stored == 8  # bits, whatever the opset
    few = [name for name, bits in widths.items() if bits <= 4 and not in_eight]
    if opset < OPSET and few:
        raise DataError(
            f"opset={opset}: types of 4 bits need {OPSET} or more, those of 2 bits {OPSET_OF_INT2}; {listed(few)} "
            "would be stored in 8 bits: quantize them to more than 4 bits, or choose a later opset"
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


def other_types(model: nn.Module) -> str:
    """Floating types of the model's tensors, in words, if onnxruntime lacks most operators of one; "" if not."""
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    of_quantizers = {id(t) for q in quantizers(model) for t in [*q.parameters(), *q.buffers()]}
    types = {str(t.dtype).removeprefix("torch.") for t in tensors if id(t) not in of_quantizers}
    return " and ".join(sorted(types)) if types - {"float32", "float16"} else ""


def _notes(model: nn.Module, target: Target | None) -> list[str]:
    """What a reader of the file has to know."""
    notes = []
    if target is not None and not target.tried:
        notes.append(f"written for {target.name} by its documents: no {target.name} has run files of lq yet")
    least = 2 if target is None else target.least_stored
    few = any(int(weight.bits.max()) <= least // 2 for weight in integer_weights(model).values())
    if target is not None and least > 2 and few:  # the smallest type there is
        notes.append(f"weights of fewer bits are stored in {least}: {target.name} reads no smaller type")
    sites = activation_quantizers(model)
    widths = Counter(int(q.bits) for q in sites.values() if q.calibrated)
    if unreached := [name for name, site in sites.items() if site.unreached]:
        notes.append(f"{len(unreached)} activations that calibration did not reach stay float ({unreached[0]}, ...)")
    narrow = {bits: count for bits, count in sorted(widths.items()) if bits not in (8, 16)}
    if narrow:
        counts = ", ".join(f"{count} of {bits} bits" for bits, count in narrow.items())
        notes.append(f"activations with other widths than 8 are 8-bit integers, limited to their levels: {counts}")
    if widths[16]:
        notes.append(f"{widths[16]} activations of 16 bits: onnxruntime computes what reads them in float")
    if not integer_weights(model):
        notes.append("activations only: onnxruntime may round float weights between them by itself")
    if left := stay_float(model):
        notes.append(f"{left}; they are rounded where they are used")
    return notes


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise StateError(f"ONNX export needs {name}; pip install 'lq-lightning[export]'") from error
