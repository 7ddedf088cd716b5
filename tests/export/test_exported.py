"""The tests' own reading of exported files."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.export.exported import unpacked


def test_unpacking_by_hand():
    """The tests' own reading of small types is onnx's."""
    rng = np.random.default_rng(0)
    for kind, low, high in (("INT2", -2, 1), ("UINT2", 0, 3), ("INT4", -8, 7), ("UINT4", 0, 15), ("INT8", -128, 127)):
        values = rng.integers(low, high + 1, (3, 5))
        made = helper.make_tensor("w", getattr(TensorProto, kind), (3, 5), values.flatten().tolist())
        tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(made), "w")
        assert np.array_equal(unpacked(tensor), values)
