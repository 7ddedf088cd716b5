"""Changes of an exported ONNX graph that keep its function: what onnxruntime computes in integers, in few bytes.

`Graph` holds a model's nodes and initializers by name. Quantizers of one tensor become one; a transposed weight is
stored transposed; biases of layers on integers are rounded; weights are stored in the smallest type that holds their
values (int2, int4, int8), with a Cast before the DequantizeLinear, which onnxruntime does when it loads the file:
its integer kernels know 8 bits only. Levels are multiplied by a power of two there, and steps divided by it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Types of weights by their limits, small ones first: signed levels and codes.
_SIGNED = (("int2", -2, 1), ("int4", -8, 7), ("int8", -128, 127), ("int16", -32768, 32767))
_UNSIGNED = (("uint2", 0, 3), ("uint4", 0, 15), ("uint8", 0, 255), ("uint16", 0, 65535))

# Layers whose bias integer kernels round.
_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")

# Ends of names of constants that are weights of layers, and of calls.
_OF_LAYERS = "parametrizations.weight.original"
_OF_CALLS = "_weight.levels"

#: Opsets from which on there are types of 4 and of 2 bits.
OPSET, OPSET_OF_INT2 = 21, 25


class Graph:
    """Nodes and initializers of an ONNX model.

    Args:
        model: the model; changed in place by `write`.
    """

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.model = model
        self.nodes: list[Any] = list(model.graph.node)
        self.constants: dict[str, NDArray[Any]] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.stored: Counter[str] = Counter()  # numbers of weights by type
        self.biases: dict[str, NDArray[Any]] = {}  # those that were rounded
        self.moved: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}  # weights: which, and what they are now
        self._norms: dict[str, tuple[str, NDArray[Any]]] = {}  # folded biases: the norm's own, and what is in addition
        self._widened: dict[str, NDArray[Any]] = {}  # channels whose levels cannot be made finer, by weight
        self._types = 1  # how many small types there are not
        self._as_read, self._integer_biases = False, True
        self.outputs = {value.name for value in model.graph.output}

    def optimize(self, *, least_stored: int = 4, as_read: bool = False, integer_biases: bool = True) -> None:
        """All changes, in order.

        Args:
            least_stored: bits of the smallest type that weights are stored in: 2, 4 or 8.
            as_read: whether weights that take 8 bits are stored as the levels that are read, not as the model's own.
            integer_biases: whether biases of Gemm are stored as integers.
        """
        self._types = {2: 0, 4: 1, 8: 2}[least_stored]
        self._as_read, self._integer_biases = as_read, integer_biases
        self._merge_quantizers()
        self._separate_swish()
        self._transpose_weights()
        self._fold_norms()
        self._widen_steps()
        self._shrink_weights()
        self._round_biases()

    def readers(self, name: str) -> list[Any]:
        """Nodes that read a tensor."""
        return [node for node in self.nodes if name in node.input]

    def weights(self) -> Iterator[Any]:
        """DequantizeLinear nodes of constants of 8 or 16 bits."""
        found = (node for node in self.nodes if node.op_type == "DequantizeLinear" and node.input[0] in self.constants)
        return (node for node in found if self.constants[node.input[0]].dtype.itemsize <= 2)

    def _merge_quantizers(self) -> None:
        """Quantizers of one tensor that are alike, and what follows them, become one."""
        first: dict[tuple[Any, ...], str] = {}
        renamed: dict[str, str] = {}
        kept = []
        for node in self.nodes:
            for i, name in enumerate(node.input):
                node.input[i] = renamed.get(name, name)
            key = (node.op_type, tuple(map(self._value, node.input)), str(list(node.attribute)))
            same = node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip") and node.output[0] not in self.outputs
            if same and first.setdefault(key, node.output[0]) != node.output[0]:
                renamed[node.output[0]] = first[key]
            else:
                kept.append(node)
        self.nodes = kept

    def _value(self, name: str) -> Any:
        """A tensor for comparisons: small constants by their value, others by their name."""
        found = self.constants.get(name)
        return name if found is None or found.size > 1 else (found.dtype.str, found.tobytes())

    def _separate_swish(self) -> None:
        """Put a Clip without limits before x * sigmoid(x), so that onnxruntime computes it in one go.

        Else it gives each reader of a DequantizeLinear its own, and no longer sees that both read the same.
        """
        made = {node.output[0]: node for node in self.nodes}
        for sigmoid in [node for node in self.nodes if node.op_type == "Sigmoid"]:
            x = sigmoid.input[0]
            products = [node for node in self.readers(sigmoid.output[0]) if node.op_type == "Mul" and x in node.input]
            if x not in made or made[x].op_type != "DequantizeLinear" or len(products) != 1:
                continue
            apart = self._insert(sigmoid, "Clip", [x], f"{x}_apart")
            for node in (sigmoid, products[0]):
                node.input[:] = [apart if name == x else name for name in node.input]

    def _transpose_weights(self) -> None:
        """Store a weight as it is multiplied: no Transpose between its DequantizeLinear and the product."""
        for node in list(self.weights()):
            readers = self.readers(node.output[0])
            source, weight = node.input[0], self.constants[node.input[0]]
            shared = len(self.readers(source)) > 1 or node.output[0] in self.outputs
            if shared or len(readers) != 1 or readers[0].op_type != "Transpose":
                continue
            order = next((list(a.ints) for a in readers[0].attribute if a.name == "perm"), None)
            order = list(range(weight.ndim))[::-1] if order is None else order
            self.constants[source] = np.ascontiguousarray(weight.transpose(order))
            for attribute in node.attribute:
                if attribute.name == "axis" and self.constants[node.input[1]].ndim:
                    attribute.i = order.index(attribute.i % weight.ndim)
            node.output[0] = readers[0].output[0]
            self.nodes.remove(readers[0])

    def _fold_norms(self) -> None:
        """Fold BatchNorms into the steps of the convolution before them: its integers stay, but for their sign.

        Steps of channels with a negative factor become negative here; `_shrink_weights` turns their levels around. The
        level -128 becomes -127 there: no 8-bit integer is 128.
        """
        made = {node.output[0]: node for node in self.nodes}
        for norm in [node for node in self.nodes if node.op_type == "BatchNormalization" and len(node.output) == 1]:
            conv = made.get(norm.input[0])
            if conv is None or conv.op_type != "Conv" or len(self.readers(conv.output[0])) > 1:
                continue
            if conv.output[0] in self.outputs:
                continue
            weight, names = made.get(conv.input[1]), [*norm.input[1:], *conv.input[2:]]
            parts = [self.constants.get(name) for name in names]
            if weight is None or weight not in list(self.weights()) or any(part is None for part in parts):
                continue
            source, step, zeros = weight.input
            alone = len(self.readers(source)) == 1 and len(self.readers(weight.output[0])) == 1
            gamma, beta, mean, variance, *bias = (np.asarray(part, np.float64) for part in parts)
            epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
            gain = gamma / np.sqrt(variance + epsilon)
            codes, zero_point = self.constants[source], np.broadcast_to(self.constants[zeros], gain.shape)
            spread = (-1, *[1] * (codes.ndim - 1))
            levels = (codes.astype(np.int32) - zero_point.reshape(spread)) * np.sign(gain).reshape(spread)
            if not alone or levels.min(initial=0) < -128 or levels.max(initial=0) > 128:
                continue
            beyond = levels == 128
            if beyond.any() and source.endswith(_OF_CALLS):
                continue  # the model's parameter may be another part of it
            if beyond.any():
                steps = np.broadcast_to(self.constants[step], gain.shape).reshape(spread)
                codes = (codes + beyond).astype(codes.dtype)
                self.moved[source] = beyond, np.broadcast_to(-127 * steps, codes.shape)[beyond].astype(np.float32)
            dead = gain == 0
            zeroed = np.where(dead.reshape(spread), zero_point.reshape(spread), codes)
            self.constants[source] = zeroed.astype(codes.dtype)
            folded = np.where(dead, 1.0, gain) * self.constants[step]
            weight.input[1] = self._constant(f"{source}_folded_scale", folded.astype(np.float32))
            weight.input[2] = self._constant(f"{source}_folded_zeros", zero_point.copy())
            del weight.attribute[:]  # one step for all had no axis
            weight.attribute.append(_integer("axis", 0))
            shift = (bias[0] - mean if bias else -mean) * gain
            total = self._constant(f"{norm.output[0]}_bias", (shift + beta).astype(np.float32))
            del conv.input[2:]
            conv.input.append(total)
            conv.output[0] = norm.output[0]
            self._norms[total] = self._module_of(norm), shift
            self.nodes.remove(norm)

    def _module_of(self, norm: Any) -> str:
        """Name of a norm's bias in the model, by the constants that no other norm has; "" if it shares all of them."""
        own = [name for name in norm.input[1:] if name in self.constants and len(self.readers(name)) == 1]
        return f"{own[0].rpartition('.')[0]}.bias".lstrip(".") if own else ""

    def _round_biases(self) -> None:
        """Make biases of layers on integers multiples of the products of steps, as integer kernels do anyway.

        So all engines say the same. A Gemm gets integers: with a float bias onnxruntime computes it in float.
        """
        made = {node.output[0]: node for node in self.nodes}
        for node in [node for node in self.nodes if node.op_type in _WITH_BIAS and len(node.input) == 3]:
            name = node.input[2]
            bias = self.constants.get(name)
            parts = [made.get(operand) for operand in node.input[:2]]
            steps = [self.constants.get(p.input[1]) for p in parts if p is not None and p.op_type == "DequantizeLinear"]
            if bias is None or len(self.readers(name)) > 1 or len(steps) < 2 or steps[0] is None or steps[1] is None:
                continue
            scale = np.broadcast_to(steps[0] * steps[1], bias.shape).astype(np.float32)
            codes = np.rint(bias.astype(np.float64) / scale)
            if not np.isfinite(codes).all() or np.abs(codes).max(initial=0) >= 2**31:
                self._add_bias_apart(node, bias)
                continue
            rounded = codes.astype(np.float32) * scale
            self.constants[name] = rounded
            owner, shift = self._norms.get(name, (name, 0.0))
            self.biases[owner] = (rounded - shift).astype(np.float32)
            if node.op_type == "Gemm" and self._integer_biases:
                integer = self._constant(f"{name}_integer", codes.astype(np.int32))
                inputs = [integer, self._constant(f"{name}_scale", scale)]
                node.input[2] = self._insert(node, "DequantizeLinear", inputs, f"{name}_value", axis=0)

    def with_float_inputs(self) -> list[str]:
        """Integer weights of matrix products whose other operand is float: onnxruntime may quantize that by itself."""
        made = {node.output[0]: node for node in self.nodes}
        found = []
        for node in self.nodes:
            if node.op_type in ("MatMul", "Gemm"):
                left, right = (made.get(operand) for operand in node.input[:2])
                if right is None or right.op_type != "DequantizeLinear":
                    continue
                if left is None or left.op_type != "DequantizeLinear":
                    name = right.input[0]
                    while name in made:
                        name = made[name].input[0]
                    found.append(name.removesuffix(".weight"))
        return found

    def _add_bias_apart(self, node: Any, bias: NDArray[Any]) -> None:
        """Take a bias out of its layer: onnxruntime would make an integer of it that overflows."""
        from onnx import helper

        sizes = [len(a.ints) for a in node.attribute if a.name == "kernel_shape"]
        shape = (-1, *[1] * next(iter(sizes), 0 if node.op_type == "Gemm" else 2))
        name = self._constant(f"{node.output[0]}_bias", bias.reshape(shape))
        del node.input[2:]
        without = f"{node.output[0]}_without_bias"
        added = helper.make_node("Add", [without, name], [node.output[0]], f"{node.output[0]}_with_bias")
        node.output[0] = without
        self.nodes.insert(self.nodes.index(node) + 1, added)

    def _widen_steps(self) -> None:
        """Give channels that hardly differ from their bias a step with which that bias fits the integers of kernels.

        Of weights of 8 bits and less; wider ones are computed with in float. Beside such a bias b the products of a
        channel are small: at most 127 * 255 / 2**31 of it for each weight. With the step b / (2**30 * step of input)
        rounding them once more changes less than 1.2e-7 of b for each weight.
        Channels of dead filters, whose norm gives them their value, otherwise keep the whole layer out of the integers.
        """
        made, weights = {node.output[0]: node for node in self.nodes}, {node.output[0] for node in self.weights()}
        for node in [node for node in self.nodes if node.op_type in _WITH_BIAS and len(node.input) == 3]:
            bias = self.constants.get(node.input[2])
            of_input, of_weight = (made.get(operand) for operand in node.input[:2])
            if bias is None or of_input is None or of_weight is None or of_weight.output[0] not in weights:
                continue
            source, step, zeros = of_weight.input
            steps, codes = self.constants[step], self.constants[source]
            input_step = self.constants.get(of_input.input[1]) if of_input.op_type == "DequantizeLinear" else None
            if input_step is None or steps.shape != bias.shape or codes.dtype.itemsize > 1:
                continue
            if len(self.readers(source)) > 1 or len(self.readers(of_weight.output[0])) > 1:
                continue
            least = np.abs(bias.astype(np.float64)) / (2.0**30 * float(np.max(input_step)))
            widened = np.abs(steps) < 64 * least  # levels may be multiplied by up to 64 when they are stored
            if not np.isfinite(least).all() or not widened.any():
                continue
            self._widened[source] = widened
            axis = next((a.i for a in of_weight.attribute if a.name == "axis"), 1)
            spread = [-1 if i == axis else 1 for i in range(codes.ndim)]
            wider = np.maximum(np.abs(steps), least) * np.where(steps < 0, -1.0, 1.0)
            middle = self.constants[zeros].astype(np.int32).reshape(spread)
            levels = (codes.astype(np.int32) - middle) * (steps / wider).reshape(spread)
            self.constants[source] = (np.rint(levels) + middle).astype(codes.dtype)
            of_weight.input[1] = self._constant(f"{of_weight.output[0]}_wide_scale", wider.astype(np.float32))

    def _shrink_weights(self) -> None:
        """Store weights in the smallest type that holds them, and have them computed with as large int8 levels."""
        done: dict[tuple[str, str], tuple[str, NDArray[Any]]] = {}  # equal integers of several layers are stored once
        used: set[str] = set()
        for node in list(self.weights()):
            source, step, zeros = node.input
            codes, zero_point = self.constants[source], self.constants[zeros]
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if i == axis else 1 for i in range(codes.ndim)] if zero_point.ndim else []
            centre = zero_point.astype(np.int32).reshape(shape)
            levels = codes.astype(np.int32) - centre
            if levels.min(initial=0) < -128 or levels.max(initial=0) > 127:  # 16 bits, or 8 bits with zero points
                self.stored[codes.dtype.name] += codes.size
                continue
            signs = np.sign(self.constants[step]).astype(np.int32).reshape(shape)
            if (source, zeros) not in done:
                name = source.replace(_OF_LAYERS, "weight").replace("call_quantizers.", "").removesuffix(".levels")
                name += f"_{len(done)}" * (source in used)
                factors = _factors(levels * signs, shape)
                if source in self._widened:
                    factors = np.where(self._widened[source].reshape(shape), 1, factors).astype(np.int32)
                done[source, zeros] = self._stored(name, node, codes, centre, factors * signs)
                used.add(source)
            node.input[0], factors = done[source, zeros]
            node.input[2] = self._constant(f"{node.output[0]}_zeros", np.zeros(zero_point.shape, np.int8))
            if (factors != 1).any():
                scaled = self.constants[step] / factors.reshape(zero_point.shape)
                node.input[1] = self._constant(f"{node.output[0]}_scale", scaled.astype(np.float32))

    def _stored(
        self, name: str, node: Any, codes: NDArray[Any], centre: NDArray[Any], factors: NDArray[Any]
    ) -> tuple[str, NDArray[Any]]:
        """Store a weight; returns the name of its int8 levels times `factors`, and those.

        Kernels round biases to multiples of the steps of input and weight: finer steps keep them exact.
        """
        types = _SIGNED if codes.dtype.kind == "i" else _UNSIGNED
        kind = _smallest(codes, types[self._types :])
        if self._as_read and kind in ("int8", "uint8"):
            self.stored["int8"] += codes.size
            return self._constant(name, ((codes.astype(np.int32) - centre) * factors).astype(np.int8)), factors
        self.stored[kind] += codes.size
        stored = self._constant(name, codes.astype(_type(kind)))
        if kind == "int8" and not (factors != 1).any():
            return stored, factors
        levels = self._insert(node, "Cast", [stored], f"{name}_int32", to="INT32")
        if centre.any():
            centred = [levels, self._constant(f"{name}_zero_points", centre)]
            levels = self._insert(node, "Sub", centred, f"{name}_levels")
        if (factors != 1).any():
            scaled = [levels, self._constant(f"{name}_factors", factors)]
            levels = self._insert(node, "Mul", scaled, f"{name}_scaled")
        return self._insert(node, "Cast", [levels], f"{name}_int8", to="INT8"), factors

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = value
        return name

    def _insert(self, before: Any, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A new node, in front of the one that reads its result."""
        from onnx import TensorProto, helper

        if "to" in attributes:
            attributes["to"] = getattr(TensorProto, attributes["to"])
        self.nodes.insert(self.nodes.index(before), helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def write(self) -> None:
        """Put nodes and constants into the model, without what nobody reads."""
        from onnx import numpy_helper

        graph = self.model.graph
        # where the exporter notes lines of code
        for owner in (self.model, graph, *self.nodes, *graph.input, *graph.output):
            del owner.metadata_props[:]
            owner.doc_string = ""
        read = {name for node in self.nodes for name in node.input} | self.outputs
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in read
        )


def _integer(name: str, value: int) -> Any:
    from onnx import helper

    return helper.make_attribute(name, value)


def _factors(levels: NDArray[Any], shape: list[int]) -> NDArray[Any]:
    """For each channel (or for all), the largest power of two that keeps its levels within +-64, at least 1; int32.

    Processors without VNNI add pairs of products with 8-bit activations in 16 bits: larger levels may overflow there.
    """
    axes = tuple(i for i, size in enumerate(shape) if size == 1) if shape else None
    largest = np.abs(levels).max(axes, initial=1, keepdims=True)
    factors: NDArray[Any] = np.exp2(np.floor(np.log2(np.maximum(64 / largest, 1)))).astype(np.int32)
    return factors if shape else factors.reshape(())


def _smallest(values: NDArray[Any], types: Sequence[tuple[str, int, int]]) -> str:
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    return next(name for name, least, most in types if least <= low and high <= most)


def _type(name: str) -> Any:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))
