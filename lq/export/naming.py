"""Names in an ONNX graph that people see: of its inputs and outputs, and of their free dimensions."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lq.errors import DataError
from lq.export.program import IMAGES, SIZES


def name_dimensions(model: Any) -> None:
    """Call free dimensions "batch", "height" and "width", where torch.export counts them ("s77"), in place."""
    known: dict[str, str] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        named = {0: "batch", **SIZES} if len(dims) == IMAGES else {0: "batch"}
        for axis, name in named.items():
            if axis < len(dims) and dims[axis].dim_param:
                known.setdefault(dims[axis].dim_param, name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: known.get(found[0], found[0]), dim.dim_param)


def rename(model: Any, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> None:
    """Give the inputs and outputs of a model other names, in place; None: they keep theirs.

    Raises:
        DataError: if there are not as many, or a name is given twice.
    """
    graph = model.graph
    renamed: dict[str, str] = {}
    for names, values, option in (
        (inputs, graph.input, "input_names"),
        (outputs, graph.output, "output_names"),
    ):
        now = [value.name for value in values]
        if names is None:
            names = now  # noqa: PLW2901
        if len(names) != len(now) or isinstance(names, str):
            raise DataError(
                f"{option}={names if isinstance(names, str) else list(names)!r}: the file has {len(now)} of them, "
                f"{', '.join(now)}; give a list with a name for each"
            )
        renamed |= dict(zip(now, names, strict=True))
    twice = [name for name in renamed.values() if list(renamed.values()).count(name) > 1 or not name]
    if twice:
        raise DataError(f"{twice[0]!r} names two inputs or outputs, or none; give each a name of its own")
    kept = {old for old, new in renamed.items() if old == new}
    inner = {name for name in _tensors(graph) if name not in renamed}
    for name in inner & (set(renamed.values()) - kept):  # a tensor in between has that name already
        renamed[name] = next(free for i in range(len(inner) + 1) if (free := f"{name}_{i}") not in inner)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def _tensors(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        yield from node.output
