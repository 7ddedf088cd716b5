"""ONNX graphs in older versions of the operators, down to the first that has per-channel steps.

torch exports opset 18 and later. Most operators are the same in earlier ones, or differ in types that no graph here
has; the others are written differently below. What an older version cannot say is an error that names the operator.
Integers of 16 bits, which the quantize operators know from opset 21 on, become floats with the same values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lq.errors import DataError

#: The oldest opset that torch exports, and the oldest that `lowered` makes: the first with steps per channel.
NEWEST_LOWERED, OLDEST = 18, 13

# Opset from which on integers of 16 bits are quantized to.
_OF_16_BITS = 21

# Attributes that older versions lack, and the value that is theirs.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "BatchNormalization": {"training_mode": 0},
    "Reshape": {"allowzero": 0},
    "Split": {"num_outputs": None},  # any: it is the number of outputs
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "ScatterElements": {"reduction": b"none"},
    "ScatterND": {"reduction": b"none"},
    "LSTM": {"layout": 0},
    "GRU": {"layout": 0},
    "RNN": {"layout": 0},
    "LpPool": {"ceil_mode": 0},
}


def lowered(model: Any, opset: int) -> None:
    """Write a model in an older opset, in place.

    Args:
        model: an ONNX model of opset 18 or later, without subgraphs.
        opset: version of the operators, 13 or later.

    Raises:
        DataError: if it has an operator that the older version lacks.
    """
    from onnx import helper

    graph = _Lowered(model.graph, opset)
    if opset < _OF_16_BITS:
        graph.replace_16_bits()
    current = next(found for found in model.opset_import if found.domain == "")
    if opset < current.version:
        graph.rewrite(current.version)
        current.version = opset
    model.ir_version = min(model.ir_version, helper.find_min_ir_version_for(model.opset_import))


class _Lowered:
    """Nodes of a graph on their way to an older opset."""

    def __init__(self, graph: Any, opset: int) -> None:
        from onnx import numpy_helper

        self.graph = graph
        self.opset = opset
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.made: list[Any] = []

    def replace_16_bits(self) -> None:
        """Quantize to 16 bits, and dequantize, in floats."""
        wide = {"uint16", "int16"}
        names = {name for name, value in self.constants.items() if value.dtype.name in wide}
        rules = {"QuantizeLinear": self._quantize, "DequantizeLinear": self._dequantize}
        self._each(lambda node: rules.get(node.op_type) if names & {*node.input[2:3]} else None)

    def rewrite(self, current: int) -> None:
        """Write the nodes in the older opset."""
        self._each(lambda node: self._rule(node, current))

    def _each(self, rule_of: Callable[[Any], Callable[[Any], None] | None]) -> None:
        """Replace the nodes that a rule is for by what it makes."""
        nodes, self.made = list(self.graph.node), []
        for node in nodes:
            (rule_of(node) or self.made.append)(node)
        del self.graph.node[:]
        self.graph.node.extend(self.made)

    def _rule(self, node: Any, current: int) -> Callable[[Any], None] | None:
        """What rewrites a node; None if it is the same in both."""
        from onnx import defs

        now = defs.get_schema(node.op_type, current, node.domain)
        if now.since_version <= self.opset:
            return None
        special = {"LayerNormalization": self._layer_norm, "HardSwish": self._hard_swish, "Mish": self._mish}
        special |= {"Shape": self._shape}
        if node.op_type in special:
            return special[node.op_type]
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise self._error(node, "which has a graph inside")
        if node.op_type.startswith("Reduce"):
            return self._reduce
        try:
            then = defs.get_schema(node.op_type, self.opset, node.domain)
        except defs.SchemaError as error:
            raise self._error(node, f"which is there from opset {now.since_version} on") from error
        self._drop_defaults(node)
        unknown = [attribute.name for attribute in node.attribute if attribute.name not in then.attributes]
        if unknown:
            raise self._error(node, f"whose {unknown[0]} is there from opset {now.since_version} on")
        if len(node.input) > then.max_input or len(node.output) > then.max_output:
            raise self._error(node, f"which takes {len(node.input)} inputs from opset {now.since_version} on only")
        return None

    def _drop_defaults(self, node: Any) -> None:
        """Leave out attributes that an older version lacks, where they say what it does."""
        from onnx import helper

        defaults = _DEFAULTS.get(node.op_type, {})
        shape = self.constants.get(node.input[1]) if node.op_type == "Reshape" else None
        for attribute in list(node.attribute):
            if attribute.name not in defaults:
                continue
            value, default = helper.get_attribute_value(attribute), defaults[attribute.name]
            if default is None or value == default or (shape is not None and 0 not in shape):
                node.attribute.remove(attribute)

    def _error(self, node: Any, reason: str) -> DataError:
        return DataError(
            f"opset={self.opset} is too old for {node.op_type} ({node.name}), {reason}; choose a later one"
        )

    # --- operators that are written differently -----------------------------------------------------------------------

    def _reduce(self, node: Any) -> None:
        """Axes are an attribute."""
        axes = node.input[1] if len(node.input) > 1 else ""
        if axes and axes not in self.constants:
            raise self._error(node, "whose axes are computed")
        attributes = _attributes(node)
        nothing = attributes.pop("noop_with_empty_axes", 0) and (not axes or not self.constants[axes].size)
        if nothing:
            self._add("Identity", [node.input[0]], node.output[0])
            return
        if axes and self.constants[axes].size:
            attributes["axes"] = self.constants[axes].tolist()
        self._add(node.op_type, [node.input[0]], node.output[0], **attributes)

    def _shape(self, node: Any) -> None:
        """A part of the shape is cut out."""
        name, attributes = node.output[0], _attributes(node)
        if not attributes:
            self.made.append(node)
            return
        ends = (attributes.get("start", 0), attributes.get("end", np.iinfo(np.int64).max))
        bounds = [self._constant(f"{name}_{i}", np.array([end], np.int64)) for i, end in enumerate(ends)]
        self._add("Slice", [self._add("Shape", [node.input[0]], f"{name}_whole"), *bounds], name)

    def _hard_swish(self, node: Any) -> None:
        """``x * clip(x / 6 + 1 / 2, 0, 1)``."""
        gate = self._add("HardSigmoid", [node.input[0]], f"{node.output[0]}_gate", alpha=1 / 6, beta=0.5)
        self._add("Mul", [node.input[0], gate], node.output[0])

    def _mish(self, node: Any) -> None:
        """``x * tanh(softplus(x))``."""
        soft = self._add("Softplus", [node.input[0]], f"{node.output[0]}_softplus")
        gate = self._add("Tanh", [soft], f"{node.output[0]}_gate")
        self._add("Mul", [node.input[0], gate], node.output[0])

    def _layer_norm(self, node: Any) -> None:
        """Mean and variance over the last dimensions."""
        name, x, attributes = node.output[0], node.input[0], _attributes(node)
        scale = self.constants.get(node.input[1])
        axis = int(attributes.get("axis", -1))
        if len([output for output in node.output if output]) > 1 or (axis >= 0 and scale is None):
            raise self._error(node, "which is there from opset 17 on")
        count = -axis if axis < 0 or scale is None else scale.ndim
        axes = list(range(-count, 0))
        mean = self._add("ReduceMean", [x], f"{name}_mean", axes=axes, keepdims=1)
        centred = self._add("Sub", [x, mean], f"{name}_centred")
        square = self._add("Mul", [centred, centred], f"{name}_square")
        variance = self._add("ReduceMean", [square], f"{name}_variance", axes=axes, keepdims=1)
        kind = np.float32 if scale is None else scale.dtype
        epsilon = self._constant(f"{name}_epsilon", np.array(attributes.get("epsilon", 1e-5), kind))
        shifted = self._add("Add", [variance, epsilon], f"{name}_shifted")
        root = self._add("Sqrt", [shifted], f"{name}_root")
        normal = self._add("Div", [centred, root], f"{name}_normal")
        bias = node.input[2] if len(node.input) > 2 else ""
        scaled = self._add("Mul", [normal, node.input[1]], f"{name}_scaled" if bias else name)
        if bias:
            self._add("Add", [scaled, bias], name)

    def _quantize(self, node: Any) -> None:
        """The codes of a QuantizeLinear, as floats."""
        name, zeros = node.output[0], self.constants[node.input[2]]
        readers = [other for other in self.graph.node if name in other.input]
        if zeros.ndim or any(other.op_type != "DequantizeLinear" for other in readers):
            raise self._error(node, f"to 16 bits, which is there from opset {_OF_16_BITS} on")
        limits = np.iinfo(zeros.dtype)
        quotient = self._add("Div", list(node.input[:2]), f"{name}_quotient")
        rounded = self._add("Round", [quotient], f"{name}_rounded")
        offset = self._constant(f"{name}_zero", zeros.astype(np.float32))
        shifted = self._add("Add", [rounded, offset], f"{name}_shifted")
        low, high = (self._constant(f"{name}_{end}", np.float32(getattr(limits, end))) for end in ("min", "max"))
        self._add("Clip", [shifted, low, high], name)

    def _dequantize(self, node: Any) -> None:
        """The values of codes, which are floats or stored integers."""
        name, (codes, scale, zero) = node.output[0], node.input
        zeros = self.constants[zero].astype(np.float32)
        if codes in self.constants:
            axis = int(_attributes(node).get("axis", 1))
            shape = [-1 if i == axis else 1 for i in range(self.constants[codes].ndim)] if zeros.ndim else []
            codes = self._add("Cast", [codes], f"{name}_float", to=1)
            zeros = zeros.reshape(shape)
            if shape:
                scale = self._constant(f"{name}_scale", self.constants[scale].reshape(shape))
        if zeros.any():
            codes = self._add("Sub", [codes, self._constant(f"{name}_zero", zeros)], f"{name}_centred")
        self._add("Mul", [codes, scale], name)

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.made.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants[name] = np.asarray(value)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
