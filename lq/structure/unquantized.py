"""Why a parameter stays in float: by the functions that read it."""

from lq.structure.structure import NOT_USED
from lq.structure.values import NORMS

_REASONS: tuple[tuple[set[str], str], ...] = (
    ({"bias"}, "bias"),
    (NORMS, "normalization"),
    ({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "rsub", "addcmul"}, "added, not multiplied"),
    ({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "true_divide"}, "scales elementwise"),
    ({"cat", "stack", "concat"}, "a token"),
    ({"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"}, "bias"),
)


def reason_for_float(uses: set[str]) -> str:
    """What is told of a parameter that these functions read.

    >>> reason_for_float({"layer_norm"})
    'normalization'
    >>> reason_for_float({"fft", "add"})
    'used by add, fft'
    """
    for functions, reason in _REASONS:
        if uses and uses <= functions:
            return reason
    return f"used by {', '.join(sorted(uses))}" if uses else NOT_USED
