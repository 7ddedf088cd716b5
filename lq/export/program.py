"""torch.export: a quantized model as a program of standard operators, which runs where lq is not installed."""

import inspect
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from lq.bars import at, staged
from lq.errors import DataError
from lq.export.standard import standard_form
from lq.files import file_for_torch, whole_file

P = ParamSpec("P")
R = TypeVar("R")

_exporting = threading.RLock()

#: Number of dimensions of a batch of images, and which of them are their sizes.
IMAGES, SIZES = 4, {2: "height", 3: "width"}


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """The function, waiting for other threads that export: torch.export keeps what it does in the process."""

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with _exporting:
            return function(*args, **kwargs)

    return waiting


@dataclass(frozen=True)
class Call:
    """Arguments by place and by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


#: What a model is called with: a tensor, its arguments by place or by name, or both.
Example = Tensor | Sequence[Any] | Mapping[str, Any] | Call


@one_at_a_time
@staged("Exporting", "translating", "writing")
def export_program(model: nn.Module, example: Example, path: str | Path | None = None) -> ExportedProgram:
    """A quantized model as an `ExportedProgram`: integer weights, quantize and dequantize operators, any batch size.

    The outputs are those of the model, bit for bit on the device it was exported on. A saved program runs with torch
    alone::

        import torch, torch.ao.quantization.fx._decomposed  # registers the quantize and dequantize operators
        logits = torch.export.load("model.pt2").module()(images)

    Args:
        model: a model whose quantizers have their ranges.
        example: what it is called with: a batch, a tuple of arguments, or a dict of keyword arguments.
        path: where to save it, as ".pt2"; None: nowhere.

    Raises:
        StateError: if the model has no quantizers, one of them no range, or widths are still being learned.
        DataError: if torch.export cannot export the model.

    >>> import lq
    >>> model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8)
    >>> model = lq.calibrate(lq.attach(model, weights=2, activations=4, first_last=None), [x]).eval()
    >>> torch.equal(export_program(model, x[:2]).module()(x), model(x))
    True
    """
    program, reason = exported(standard_form(model), example)
    if program is None:
        raise DataError(f"torch.export cannot export {type(model).__name__}: {reason}")
    if path is not None:
        at("writing")
        with whole_file(Path(path)) as unfinished, file_for_torch(unfinished) as file:
            torch.export.save(program, file)
    return program


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    if isinstance(example, Call):
        return tuple(example.args), dict(example.kwargs)
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def map_tensors(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """The example with its tensors changed."""
    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Call):
        return Call(*tree_map_only(Tensor, change, (tuple(example.args), dict(example.kwargs))))
    return tree_map_only(Tensor, change, example)  # type: ignore[no-any-return]


def in_float32(example: Example) -> Example:
    """The example with its floating tensors in float32."""
    return map_tensors(example, lambda x: x.float() if x.is_floating_point() else x)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def batch_length(example: Example) -> int:
    """Number of samples: the length of the first tensor with a dimension; 0 if there is none."""
    tensors = [x for x in tree_leaves(arguments(example)) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else 0


def first_samples(example: Example, count: int = 2) -> Example:
    """The first samples of an example; tensors that have no row for each sample stay whole."""
    samples = batch_length(example)
    return map_tensors(example, lambda x: x[:count] if x.ndim and len(x) == samples else x)


def pieces(batches: Sequence[Example], count: int) -> list[Example]:
    """Batches in pieces of `count` samples each; what is left over is left out."""
    found = []
    for batch in batches:
        samples = batch_length(batch)
        for first in range(0, samples - count + 1, count):
            cut = lambda x, n=samples, i=first: x[i : i + count] if x.ndim and len(x) == n else x  # noqa: E731
            found.append(map_tensors(batch, cut))
    return found


def exported(
    model: nn.Module, example: Example, free: Collection[str] = ("batch",)
) -> tuple[ExportedProgram | None, str]:
    """The program, for batches of any size if the model allows that; and why it does not, or why there is none.

    Args:
        model: a model in standard operators.
        example: what it is called with.
        free: dimensions that may have other sizes than in the example: "batch", which the program does without if it
            has to, "height" and "width" of images, which it has to have.
    """
    samples = batch_length(example)
    doubled = map_tensors(example, lambda x: torch.cat([x, x]) if x.ndim and len(x) == samples == 1 else x)
    sizes = [name for name in free if name != "batch"]
    attempts = [(doubled, [*sizes, "batch"])] if "batch" in free else []  # a size of 1 would become fixed
    reason = ""
    for given, names in [*attempts, (example, sizes)]:
        args, kwargs = arguments(given)
        shapes = _free_dimensions(model, args, kwargs, max(samples, 2), names) if names else None
        try:
            with torch.no_grad():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
                if sizes:  # torch lets pass sizes that have to fit each other
                    larger, more = arguments(map_tensors(given, lambda x: _doubled(x, sizes)))
                    program.module()(*larger, **more)
            for module in program.graph_module.modules():
                for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # where the model's code lies on this machine
            return program, reason
        except Exception as error:  # noqa: BLE001  # torch has no one class for what cannot be exported
            reason = reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None, reason


def refused_sizes(model: nn.Module, example: Example, free: Collection[str]) -> str:
    """Why a model does not run on images of another size; "" if it does, or none is to be free.

    Found out by running it, so it costs little and may miss what `exported` finds.

    Args:
        model: the model, in evaluation.
        example: what it is called with.
        free: dimensions that may have other sizes than in the example.
    """
    sizes = [name for name in free if name != "batch"]
    if not sizes:
        return ""
    args, kwargs = arguments(map_tensors(example, lambda x: _doubled(x, sizes)))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # whatever the network's code raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ""


def _doubled(x: Tensor, sizes: Collection[str]) -> Tensor:
    """Images twice as high, or wide, or both; other tensors as they are."""
    for axis, name in SIZES.items():
        if name in sizes and x.ndim == IMAGES:
            x = torch.cat([x, x], axis)
    return x


def _free_dimensions(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, free: Collection[str]
) -> Any:
    """Which dimensions are free: 0 of all tensors with a row for each sample, the last two of images."""
    batch = Dim("batch")

    def shape(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        found: dict[int, Any] = {0: batch} if "batch" in free and x.ndim and len(x) == samples else {}
        if x.ndim == IMAGES:
            found |= {axis: Dim.DYNAMIC for axis, name in SIZES.items() if name in free}
        return found or None

    if kwargs:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments if args else kwargs
        return {key: shape(value) for key, value in named.items()}
    listed = next(iter(inspect.signature(model.forward).parameters.values()), None)
    given = tuple(map(shape, args))
    return (given,) if listed is not None and listed.kind is inspect.Parameter.VAR_POSITIONAL else given


def groups_by_sample(program: ExportedProgram) -> bool:
    """Whether the number of groups of a convolution is computed from a size; ONNX has a constant there."""
    convolutions = (n for n in program.graph.nodes if n.op == "call_function" and "conv" in str(n.target))
    return any(isinstance(number, torch.fx.Node) for n in convolutions for number in n.args[3:])
