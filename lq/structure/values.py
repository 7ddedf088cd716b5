"""Values of a trace: what they are selections of, who reads them, and the kinds of functions that tell rules apart."""

from lq.structure.tracing import Trace, Value

#: Functions of a weight, each row of which makes a channel of the result.
KEEPING_ROWS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding",
}  # fmt: skip
#: Functions that multiply two tensors.
MULTIPLYING = KEEPING_ROWS | {"matmul", "einsum", "rnn", "lstm_cell", "gru_cell", "rnn_cell"}
#: Functions that normalize.
NORMS = {
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm", "native_group_norm",
}  # fmt: skip
#: Functions that are a little below zero for negative values, and the values themselves where these are large.
GELUS = {"gelu", "silu", "mish", "hardswish"}


def is_normalized(value: Value) -> bool:
    """Whether a norm that does not keep channels apart reads it."""
    return bool(set(value.readers) & (NORMS - {"batch_norm", "instance_norm"}))


def chain(value: Value) -> list[Value]:
    """The value and the values it is a selection of."""
    found = [value]
    while found[-1].within is not None:
        found.append(found[-1].within)
    return found


def source_of(value: Value) -> Value:
    """What the value is a selection of in the end."""
    return chain(value)[-1]


def leads_to(value: Value, later: Value) -> bool:
    """Whether `later` is `value` or a selection of it (padded, say)."""
    return any(v is value for v in chain(later))


def behind(value: Value, kinds: set[str], trace: Trace) -> Value:
    """The result of a call of these kinds that alone reads the value, or itself."""
    if len(value.readers) == 1:
        for event in trace.calls:
            if event.kind in kinds and event.operands.get(0) is value:  # type: ignore[call-overload]
                return event.result
    return value


def join(module: str, name: str) -> str:
    """Name of a part of a module; the outermost one's is empty."""
    return f"{module}.{name}".lstrip(".")
