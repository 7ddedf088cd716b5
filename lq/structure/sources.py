"""Where the weights of functional calls are kept: which parameter, or which part of one, a call multiplies by.

A quantizer at a call gets its weight when the call is made. The source says where that weight lies, so that its range
can be found, and its codes stored, without running the model. A weight that is computed first (standardized, scaled)
has none. Parts of parameters are told by offset and strides in elements of the contiguous parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lq.structure.channels import ChannelLayout


@dataclass(frozen=True)
class Source:
    """A parameter, or a part of one.

    Args:
        parameter: its name: in the model, or, on a quantizer, in the module that makes the call.
        shape: shape of the part, as the call multiplies by it.
        channels: number of output channels of the part; see `ChannelLayout`.
        dim: dimension that holds them.
        groups: blocks of dimension 0 that have channels of their own.
        offset: first element of the part.
        stride: its strides; None: the parameter as it is.
        alone: whether nothing but calls that can be quantized reads the parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    channels: int
    dim: int = 0
    groups: int = 1
    offset: int = 0
    stride: tuple[int, ...] | None = None
    alone: bool = True

    @classmethod
    def of(cls, name: str, parameter: Tensor, operand: Tensor, layout: ChannelLayout) -> "Source | None":
        """The source of an operand that shares the memory of a parameter; None: strides cannot say which part it is."""
        found = cls(name, tuple(operand.shape), layout.channels, layout.dim, layout.groups)
        if _place(operand) == _place(parameter):
            return found
        if not parameter.is_contiguous():
            return None
        offset = int(operand.storage_offset()) - int(parameter.storage_offset())
        return replace(found, offset=offset, stride=tuple(operand.stride()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Source":
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        tupled: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**tupled)

    @property
    def layout(self) -> ChannelLayout:
        """Where the output channels of the part lie."""
        return ChannelLayout(self.channels, self.dim, self.groups)

    @property
    def numel(self) -> int:
        """Number of values."""
        return int(torch.Size(self.shape).numel())

    def below(self, module: str) -> "Source":
        """The same source, by its parameter's name below a module."""
        return replace(self, parameter=self.parameter[len(module) + 1 :] if module else self.parameter)

    def fits(self, parameter: Tensor) -> bool:
        """Whether a tensor is large enough to have the part."""
        if self.stride is None:
            return tuple(parameter.shape) == self.shape
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset >= 0 and self.offset + reach < parameter.numel()

    def view(self, parameter: Tensor) -> Tensor:
        """The part of a tensor shaped like the parameter; it shares the memory of a contiguous one."""
        if self.stride is None:
            return parameter
        whole = parameter.contiguous()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)

    def within(self, module: nn.Module) -> nn.Parameter | None:
        """The parameter, below the module that makes the call; None: there is none, or it is computed there."""
        path, _, last = self.parameter.rpartition(".")
        for part in path.split(".") if path else ():
            below = module._modules.get(part)
            if below is None:
                return None
            module = below
        return module._parameters.get(last)

    def gives(self, operand: Tensor, module: nn.Module) -> bool:
        """Whether an operand of a call of `module` is this part; True if that cannot be told."""
        parameter = self.within(module)
        if parameter is None:
            return True  # swapped for something else while the model is called in a functional style
        try:
            if operand.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                return False
            if self.stride is None:
                return _place(operand) == _place(parameter)
            start = operand.storage_offset() - parameter.storage_offset()
            return (start, tuple(operand.stride()), tuple(operand.shape)) == (self.offset, self.stride, self.shape)
        except (RuntimeError, NotImplementedError):  # tensors without memory: in transforms, or sparse ones
            return True


class Parameters:
    """Finds the parameter whose memory a tensor shows.

    Args:
        named: parameters by name.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._by_memory: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            if (memory := _memory(parameter)) is not None:
                self._by_memory.setdefault(memory, []).append((name, parameter))

    def find(self, tensor: Tensor) -> tuple[str, nn.Parameter] | None:
        """Name and parameter; None: the tensor has memory of its own."""
        memory = _memory(tensor)
        for name, parameter in self._by_memory.get(memory, []) if memory is not None else []:
            low, high = _extent(parameter)
            first, last = _extent(tensor)
            if tensor is parameter or (tensor.dtype == parameter.dtype and low <= first and last <= high):
                return name, parameter
        return None


def known_sources(module: nn.Module, slots: Iterable[str]) -> Iterator[tuple[str, Source]]:
    """Sources of the weights of torch's own recurrent and attention modules, by the names of their calls' operands."""
    wanted = list(slots)
    for slot, name, rows in _known(module, wanted):
        parameter = module._parameters.get(name)
        if slot not in wanted or parameter is None or parameter.ndim != 2:
            continue
        first, size = (0, len(parameter)) if rows is None else rows
        columns = parameter.shape[1]
        part = None if size == len(parameter) else (columns, 1)
        yield slot, Source(name, (size, columns), size, offset=first * columns, stride=part)


def _known(module: nn.Module, slots: list[str]) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """Operand, name of the parameter, and first row and number of rows of the part (None: all)."""
    if isinstance(module, nn.RNNBase):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        flat = [parameter for layer in module.all_weights for parameter in layer]
        yield from ((f"rnn_0_weight_{i}", names.get(id(p), ""), None) for i, p in enumerate(flat) if p.ndim == 2)
    elif isinstance(module, nn.RNNCellBase):
        kind = {nn.LSTMCell: "lstm_cell", nn.GRUCell: "gru_cell"}.get(type(module), "rnn_cell")
        yield from ((f"{kind}_0_{name}", name, None) for name in ("weight_ih", "weight_hh"))
    elif isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim
        linear = sorted(int(slot.split("_")[1]) for slot in slots if slot.startswith("linear_"))
        if linear != list(range(len(linear))):
            return  # some are not quantized: what the others are cannot be told
        parts = {1: [3 * size], 2: [size, 2 * size], 3: [size] * 3}.get(len(linear), [])
        if module._parameters.get("in_proj_weight") is not None:
            for i, rows in enumerate(parts):
                yield f"linear_{i}_weight", "in_proj_weight", (sum(parts[:i]), rows)
        else:
            yield from ((f"linear_{i}_weight", f"{name}_proj_weight", None) for i, name in enumerate("qkv"))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())


def _memory(tensor: Tensor) -> int | None:
    """Address of a tensor's memory; None: it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse, lazy, on the meta device
        return None


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last element, in elements of the memory."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first, first + max(reach, 0)
