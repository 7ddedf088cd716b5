"""An exported file in onnxruntime: what is multiplied in integers there, and how far outputs are from the model's."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq.errors import DataError
from lq.export.program import Example, arguments, map_tensors
from lq.structure.forward import eval_mode

# Operators of onnxruntime's that multiply two tensors, after its own optimization.
_IN_INTEGERS = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
_IN_INTEGERS |= {"DynamicQuantizeMatMul"}
_CONVOLUTIONS = {"Conv", "FusedConv"}
_IN_FLOATS = _CONVOLUTIONS | {"ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Einsum"}


@dataclass(frozen=True)
class Run:
    """What running a file showed. Fields as those of `OnnxReport`."""

    samples: int = 0
    largest_difference: float | None = None
    largest_output: float | None = None
    agreement: float | None = None
    products: int | None = None
    integer_products: int | None = None
    notes: tuple[str, ...] = ()


def compare(model: nn.Module, path: Path, batches: list[Example], parameters: Sequence[str] | None = None) -> Run:
    """Run a file on batches and compare its outputs with those of the model.

    Args:
        model: the model.
        path: the file.
        batches: what to run both on.
        parameters: what the file's inputs are called in the model, if they have other names.

    Raises:
        DataError: if onnxruntime cannot run the file.
    """
    if not batches:
        return Run()
    try:
        import onnxruntime
    except ImportError:
        return Run(notes=("not compared: onnxruntime is not installed",))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    samples, same, places = 0, 0, 0
    difference = largest = 0.0
    device = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            products = _products(options.optimized_model_filepath)
        names = [value.name for value in session.get_inputs()]
        for batch in batches:
            args, kwargs = arguments(map_tensors(batch, lambda x: x.to(device)))
            with eval_mode(model), torch.no_grad():
                expected = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            feed = dict(zip(names, given, strict=True))
            keys = names if parameters is None else parameters
            if isinstance(batch, Mapping) and set(keys) <= set(batch):
                feed = {name: kwargs[key] for name, key in zip(names, keys, strict=True)}
            halves = {value.name for value in session.get_inputs() if value.type == "tensor(float16)"}
            wide = {name: x.float() if x.is_floating_point() and name not in halves else x for name, x in feed.items()}
            feed = {name: x.detach().cpu().numpy() for name, x in wide.items()}
            for found, right in zip(map(torch.from_numpy, session.run(None, feed)), expected, strict=True):
                right = right.detach().cpu().float()  # noqa: PLW2901
                difference = max(difference, float((found.float() - right).abs().max()))
                largest = max(largest, float(right.abs().max()))
                if right.ndim > 1:
                    same += int((found.argmax(1) == right.argmax(1)).sum())
                    places += right.argmax(1).numel()
            samples += len(given[0]) if given and given[0].ndim else 1
    except Exception as error:
        raise DataError(f"onnxruntime cannot run the exported {type(model).__name__}: {error}") from error
    return Run(samples, difference, largest, same / places if places else None, *products)


def can_read(opset: int) -> bool:
    """Whether onnxruntime can read files of an opset; True if it is not installed, and nothing is known of it."""
    try:
        import onnxruntime
    except ImportError:
        return True
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - of several classes, none of them public
        return False
    return True


def _products(optimized: str) -> tuple[int, int, tuple[str, ...]]:
    """Multiplications in a file that onnxruntime optimized, those in integers, and a note on what would change that."""
    import onnx

    nodes = onnx.load(optimized).graph.node
    integers = sum(node.op_type in _IN_INTEGERS for node in nodes)
    floats = sum(node.op_type in _IN_FLOATS for node in nodes)
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    waiting = sum(node.op_type in _CONVOLUTIONS and dequantized.issuperset(node.input[:2]) for node in nodes)
    notes = (
        f"{waiting} convolutions of integers are computed in float, because nothing quantizes their results: "
        "integer=True (lq.attach, Quantize) does, but for those that a norm reads",
    )
    return integers + floats, integers, notes if waiting else ()
