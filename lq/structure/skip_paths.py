"""Tensors that get one quantizer for all who read them: those on skip paths, and what kernels of integers give.

On skip paths these are the tensors that a residual sum reads besides others, and each sum after its activation (BRECQ
and QDrop); the branch that only the sum reads is a result. A convolution's result is one where a function reads it that
kernels compute on 8-bit integers.
"""

from collections.abc import Callable, Iterator

from lq.structure.calls import ACTIVATIONS, FUNCTIONS
from lq.structure.tracing import Trace, Value
from lq.structure.values import NORMS, behind, is_normalized

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
# Activations that the limits of a kernel's output stand for.
_CLIPPING = {"relu", "relu6", "hardtanh", "clamp"}
# Functions that may read 8 bits; norms and functions that are not known may not.
_WITH_INTEGERS = {
    *ACTIVATIONS, "sigmoid", "sigmoid_", "hardsigmoid", "mul", "mul_", "__mul__", "__rmul__", "__imul__", "mean",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "cat", "concat", "max_pool1d", "max_pool2d", "max_pool3d", "chunk", "split",
}  # fmt: skip


def residual_tensors(trace: Trace) -> tuple[list[Value], list[tuple[Value, Value]]]:
    """What residual sums read and give.

    Returns:
        Tensors that sums read besides others, and the sums themselves after their activation; the branches that only a
        sum reads, each with its sum. Both in the order in which they were made.
    """
    skips: dict[int, Value] = {}
    branches: dict[int, tuple[Value, Value]] = {}
    for event in trace.calls:
        both = [value for value in event.operands.values() if value.varies]
        shape = event.result.shape
        if event.kind != "add" or len(event.operands) != 2 or len(both) != 2 or len(shape) < 2:
            continue
        if any(value.shape != shape for value in both) or "softmax" in event.result.readers:
            continue
        for value in both:
            if len(value.readers) > 1 and value.origin != "input":
                skips.setdefault(value.index, value)
            elif value.origin != "input":
                branches[value.index] = value, event.result
        total = behind(event.result, set(ACTIVATIONS.values()), trace)
        if not (len(total.readers) == 1 and set(total.readers) <= NORMS):  # as in post-norm transformers
            skips.setdefault(total.index, total)
    left = [pair for index, pair in sorted(branches.items()) if index not in skips]
    return sorted(skips.values(), key=lambda value: value.index), left


def convolution_results(trace: Trace, has_step: Callable[[Value], bool]) -> Iterator[Value]:
    """What convolutions give to anything but products and sums, such as an activation that is no clipping.

    Args:
        trace: of the model.
        has_step: whether all who read a value read it quantized; asked when a value's turn comes, so that it may count
            those that came before.
    """
    for event in trace.calls:
        if event.kind not in _CONVOLUTIONS:
            continue
        value = behind(behind(event.result, {"batch_norm"}, trace), _CLIPPING, trace)
        others = set(value.readers) - set(FUNCTIONS)
        joined = [part for whole in trace.concats if value in whole.parts for part in whole.parts]
        selections = [v for v in trace.values if v.within is value]
        token = not all(part.varies for part in joined)
        pooled = len(value.readers) == 1 and bool(selections) and all(has_step(v) for v in selections)
        if others and others <= _WITH_INTEGERS and not (token or pooled or any(map(is_normalized, selections))):
            yield value
