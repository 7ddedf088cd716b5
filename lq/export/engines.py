"""How an ONNX file is written for an engine whose quantized tensors are INT8 with zero point 0, such as TensorRT.

lq writes activations as UINT8, with the zero point 128 where zero lies in the middle. The same levels are INT8 with
zero point 0. Nothing but a DequantizeLinear may read quantized tensors there (`lq.quantizer.targets` says why).
"""

from typing import Any

import numpy as np

from lq.errors import DataError
from lq.quantizer.targets import Target

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_MIDDLE = 128


def with_signed_codes(model: Any, target: Target) -> None:
    """Write codes with zero point 128 as INT8 with zero point 0, in place, and look whether that is all there are.

    Raises:
        DataError: if the file has quantized tensors of another form.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    signed: dict[str, str] = {}
    for node in graph.node:
        zero = constants.get(node.input[2]) if node.op_type in _QUANTIZERS and len(node.input) > 2 else None
        if zero is None or zero.data_type != TensorProto.UINT8:
            continue
        values = numpy_helper.to_array(zero)
        if (values == _MIDDLE).all():
            if zero.name not in signed:
                signed[zero.name] = f"{zero.name}_signed"
                added = numpy_helper.from_array(np.zeros(values.shape, np.int8), signed[zero.name])
                graph.initializer.append(added)
            node.input[2] = signed[zero.name]
    read = {name for node in graph.node for name in node.input}
    for name in signed:
        if name not in read:
            graph.initializer.remove(constants[name])
    _require_int8(graph, target)


def _require_int8(graph: Any, target: Target) -> None:
    """Raise if a quantized tensor is not INT8 with zero point 0, or something else reads one."""
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    small = {name for name, tensor in constants.items() if tensor.data_type == TensorProto.INT8}
    zeros = set()
    for node in graph.node:
        if node.op_type in _QUANTIZERS:
            zero = constants.get(node.input[2]) if len(node.input) > 2 else None
            if zero is None or zero.name not in small or numpy_helper.to_array(zero).any():
                raise DataError(
                    f"target={target.name!r} takes INT8 with zero point 0 only, {node.name or node.op_type} is of "
                    "another form; quantize with the same target="
                )
            zeros.add(zero.name)
    codes = small - zeros | {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" and codes & {*node.input}:
            raise DataError(
                f"target={target.name!r} has no {node.op_type} of integers ({node.name or node.op_type}); leave the "
                "layer it is for in float, by exclude="
            )
