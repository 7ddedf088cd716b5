"""Functional calls that quantization knows: what each multiplies, by which argument, and how much work that is.

A call is named by its kind and by how many of that kind came before it in the forward of the same module:
``linear_0``, ``matmul_1``. `scaled_dot_product_attention` counts as the two products it is made of, so that fused and
unfused attention have the same names and ranges.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lq.errors import DataError
from lq.structure.channels import ChannelLayout

#: Arguments of a call: positional and by keyword.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: Where an operand is found in a call: position and keyword.
Place = tuple[int, str]

_INPUT_WEIGHT = {"input": (0, "input"), "weight": (1, "weight")}

#: Function name to kind of call and its operands. A product of which no operand is a weight has "left" and "right".
FUNCTIONS: dict[str, tuple[str, dict[str, Place]]] = {
    "linear": ("linear", _INPUT_WEIGHT),
    "conv1d": ("conv1d", _INPUT_WEIGHT),
    "conv2d": ("conv2d", _INPUT_WEIGHT),
    "conv3d": ("conv3d", _INPUT_WEIGHT),
    "conv_transpose1d": ("conv_transpose1d", _INPUT_WEIGHT),
    "conv_transpose2d": ("conv_transpose2d", _INPUT_WEIGHT),
    "conv_transpose3d": ("conv_transpose3d", _INPUT_WEIGHT),
    "embedding": ("embedding", {"weight": (1, "weight")}),
    "matmul": ("matmul", {"left": (0, "input"), "right": (1, "other")}),
    "__matmul__": ("matmul", {"left": (0, "self"), "right": (1, "other")}),
    "__rmatmul__": ("matmul", {"left": (1, "other"), "right": (0, "self")}),
    "bmm": ("matmul", {"left": (0, "input"), "right": (1, "mat2")}),
    "mm": ("matmul", {"left": (0, "input"), "right": (1, "mat2")}),
    "addmm": ("matmul", {"left": (1, "mat1"), "right": (2, "mat2")}),
    "baddbmm": ("matmul", {"left": (1, "batch1"), "right": (2, "batch2")}),
    "einsum": ("einsum", {"left": (1, ""), "right": (2, "")}),
    "lstm_cell": ("lstm_cell", {"input": (0, "input"), "weight_ih": (2, "w_ih"), "weight_hh": (3, "w_hh")}),
    "gru_cell": ("gru_cell", {"input": (0, "input"), "weight_ih": (2, "w_ih"), "weight_hh": (3, "w_hh")}),
    "rnn_tanh_cell": ("rnn_cell", {"input": (0, "input"), "weight_ih": (2, "w_ih"), "weight_hh": (3, "w_hh")}),
    "rnn_relu_cell": ("rnn_cell", {"input": (0, "input"), "weight_ih": (2, "w_ih"), "weight_hh": (3, "w_hh")}),
    "lstm": ("rnn", {"input": (0, "")}),  # and one operand for each of its weight matrices
    "gru": ("rnn", {"input": (0, "")}),
    "rnn_tanh": ("rnn", {"input": (0, "")}),
    "rnn_relu": ("rnn", {"input": (0, "")}),
}

SUMS = dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), "add")
ACTIVATIONS = {
    name: name.rstrip("_")
    for name in (
        "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "gelu", "silu", "silu_", "hardswish", "hardswish_",
        "mish", "elu", "elu_", "prelu", "hardtanh", "hardtanh_", "tanh", "softplus", "clamp", "clamp_",
    )
}  # fmt: skip
#: Function name to kind, of calls whose result can be quantized.
RESULTS = {**SUMS, **ACTIVATIONS, "batch_norm": "batch_norm"}

ATTENTION = "scaled_dot_product_attention"
MULTI_HEAD = "multi_head_attention_forward"

#: torch's multi-head attention, its functions seen one by one: the original hands itself over as a whole instead.
multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


@dataclass
class Call:
    """One call of a function in `FUNCTIONS`: its kind, and its operands by name."""

    name: str
    kind: str
    places: dict[str, Place]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Call":
        """Read the arguments of a call of `function`."""
        kind, places = FUNCTIONS[function]
        if function == "einsum" and len(args) == 2 and isinstance(args[1], (tuple, list)):
            args = (args[0], *args[1])
        if function == "einsum" and len(args) != 3:
            places = {}  # chains of products: which pairs are multiplied is torch's choice
        if kind == "rnn":
            index = max(i for i, a in enumerate(args) if isinstance(a, (tuple, list)))  # the hidden state comes before
            matrices = {f"weight_{i}": (index, str(i)) for i, w in enumerate(args[index]) if w.ndim == 2}
            places = {**places, **matrices}
        return cls(function, kind, places, args, dict(kwargs))

    def operand(self, slot: str) -> Any:
        """The tensor that is multiplied."""
        position, keyword = self.places[slot]
        if self.kind == "rnn" and keyword:
            return self.args[position][int(keyword)]
        return self.args[position] if position < len(self.args) else self.kwargs.get(keyword)

    def replace(self, slot: str, value: Tensor) -> None:
        """Have the call multiply another tensor."""
        position, keyword = self.places[slot]
        args = list(self.args)
        if self.kind == "rnn" and keyword:
            weights = list(args[position])
            weights[int(keyword)] = value
            args[position] = weights
        elif position < len(args):
            args[position] = value
        else:
            self.kwargs[keyword] = value
        self.args = tuple(args)

    def layout(self, slot: str) -> ChannelLayout:
        """Where the output channels of a weight lie."""
        weight = self.operand(slot)
        if self.kind.startswith("conv_transpose"):
            groups = int(self.kwargs.get("groups", self.args[6] if len(self.args) > 6 else 1))
            return ChannelLayout(weight.shape[1] * groups, dim=1, groups=groups)
        dim = 0
        if self.kind == "matmul":
            dim = max(weight.ndim - (1 if slot == "right" else 2), 0)
        elif self.kind == "einsum":
            mine, other, result = self._labels()
            mine, other = (mine, other) if slot == "left" else (other, mine)
            own = [label for label in mine if label in result and label not in other]
            dim = mine.index(max(own, key=lambda label: weight.shape[mine.index(label)])) if own else 0
        return ChannelLayout(weight.shape[dim], dim=dim)

    def macs(self, result: Any) -> float:
        """Multiply-accumulates of the call."""
        if self.kind == "embedding":
            return 0.0
        if self.kind == "einsum":
            return self._einsum_macs()
        if self.kind == "rnn":
            given = self.args[0]
            steps = given.shape[0] if given.ndim == 2 else given.shape[0] * given.shape[1]
            return float(steps * sum(self.operand(s).numel() for s in self.places if s != "input"))
        if self.kind.endswith("_cell"):
            weights = (self.operand(slot).numel() for slot in ("weight_ih", "weight_hh"))
            return float(self.args[0].numel() // self.args[0].shape[-1] * sum(weights))
        if self.kind == "matmul":
            return float(result.numel() * self.operand("left").shape[-1])
        weight = self.operand("weight")
        positions = self.operand("input") if self.kind.startswith("conv_transpose") else result
        return float(positions.numel() * weight[0].numel())

    def _labels(self) -> tuple[str, str, str]:
        terms, _, result = str(self.args[0]).replace(" ", "").partition("->")
        left, right = terms.split(",")
        if not result:
            both = left + right
            result = "".join(sorted(label for label in set(both) if both.count(label) == 1))
        return left, right, result

    def _einsum_macs(self) -> float:
        sizes: dict[str, int] = {}
        terms = str(self.args[0]).replace(" ", "").partition("->")[0].split(",")
        for labels, tensor in zip(terms, self.args[1:], strict=False):
            before, dots, after = labels.partition("...")
            sizes.update(zip(before, tensor.shape, strict=False))
            if after:
                sizes.update(zip(after, tensor.shape[-len(after) :], strict=True))
            if dots:
                inner = tensor.shape[len(before) : tensor.ndim - len(after)]
                sizes["..."] = max(math.prod(inner), sizes.get("...", 1))
        return float(math.prod(sizes.values()))


def attention(
    rounded: Callable[[str, Tensor], Tensor],
    fused: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with its operands quantized, as the unfused code of timm and torch computes it.

    Args:
        rounded: quantizes "query" (after scaling), "key", "value" and "probabilities" (after dropout).
        fused: the probabilities are not quantized, so that torch's own kernel can be used.
        query: ``(..., L, E)``, as the other arguments those of `F.scaled_dot_product_attention`.
        key: ``(..., S, E)``.
        value: ``(..., S, E_v)``.
        attn_mask: added to the scores; or boolean, True where attention is allowed.
        dropout_p: probability of dropping a probability.
        is_causal: no attention to later tokens.
        scale: factor on the scores, by default ``1 / sqrt(E)``.
        enable_gqa: keys and values are shared by groups of heads.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    query, key, value = rounded("query", query * scale), rounded("key", key), rounded("value", value)
    if fused:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=1.0, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        unseeing = (hidden == -torch.inf).all(-1, keepdim=True)  # a row that may attend to nothing: zeros, as in torch
        probabilities = hidden.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)
    else:
        probabilities = scores.softmax(-1)
    probabilities = F.dropout(probabilities, dropout_p) if dropout_p > 0 else probabilities
    return rounded("probabilities", probabilities.to(value.dtype)) @ value


def require_tensor(operand: Any, name: str) -> Tensor:
    """The operand, if it is a tensor.

    Raises:
        DataError: if it is not.
    """
    if not isinstance(operand, Tensor):
        raise DataError(f"{name} has a quantizer, but the call has no tensor there: got a {type(operand).__name__}")
    return operand
