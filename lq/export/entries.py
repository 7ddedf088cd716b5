"""The entries of a packed file's index: grids of quantizers, codes of weights, tensors that are kept as they are."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lq.export.integers import settled_zero_point
from lq.export.packing import packed_size
from lq.quantizer.levels import middle
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.spec import QuantSpec
from lq.structure.channels import ChannelLayout

#: Where a state dict has the float weight of a layer, and the quantizer of it.
ORIGINAL, WEIGHT = "parametrizations.weight.original", "parametrizations.weight.0"

#: Widths as characters, so that those of many channels are a short string.
WIDTH_LETTERS = "0123456789abcdefg"


@dataclass(frozen=True)
class Part:
    """The parameter that a weight of a function is, or a part of one: `Source`, and the shape of the parameter."""

    key: str
    shape: tuple[int, ...]
    offset: int = 0
    stride: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        """All of that in a line."""
        stride = "" if self.stride is None else text_of(self.stride)
        return f"{self.offset}/{stride}/{text_of(self.shape)}/{self.key}"

    @classmethod
    def of(cls, text: str) -> "Part":
        """The inverse of `text`."""
        offset, stride, shape, key = text.split("/", 3)
        return cls(key, sizes_of(shape), size_of(offset), sizes_of(stride) if stride else None)


@dataclass(frozen=True)
class Codes:
    """A weight that is stored as codes: its shape, its type and where its channels lie (`ChannelLayout`).

    Weights of layers are all of the parameter beside their quantizer; for those of functions, `part` says which it is.
    """

    shape: tuple[int, ...]
    dtype: str
    dim: int = 0
    groups: int = 1
    part: Part | None = None

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def text(self) -> str:
        """All of that in a line."""
        part = "" if self.part is None else f"/{self.part.text}"
        return f"{text_of(self.shape)}/{self.dtype}/{self.dim}/{self.groups}{part}"

    @classmethod
    def of(cls, text: str) -> "Codes":
        """The inverse of `text`."""
        shape, dtype, dim, groups, *part = text.split("/", 4)
        return cls(sizes_of(shape), dtype_of(dtype), size_of(dim), size_of(groups), Part.of(part[0]) if part else None)


@dataclass(frozen=True)
class Grid:
    """A quantizer.

    Args:
        key: its name in the state dict.
        widths: a character for each channel ("0" to "8", "g" for 16), or one for all of them.
        channels: number of channels; None: one step for the tensor.
        zeros: "middle", "zero" (unsigned), or the numpy type that zero points are stored as.
        symmetric: whether its zero is fixed by what it was made for.
        codes: the weight; None: it has none that is stored as codes.
    """

    key: str
    widths: str
    channels: int | None
    zeros: str
    symmetric: bool
    codes: Codes | None = None

    @property
    def weight_key(self) -> str:
        """Name of the weight in the state dict."""
        if self.codes is not None and self.codes.part is not None:
            return self.codes.part.key
        return self.key.removesuffix(WEIGHT) + ORIGINAL

    @property
    def bits(self) -> Tensor:
        """Widths, shape () or (C,)."""
        found = torch.tensor([float(WIDTH_LETTERS.index(c)) for c in self.widths])
        if self.channels is None:
            return found[0]
        return found if len(found) > 1 else found.repeat(self.channels)

    @property
    def kept(self) -> Tensor:
        """Which of its channels are stored: those that are not pruned; shaped like ``bits``."""
        return self.bits > 0

    @property
    def stored_types(self) -> tuple[str, ...]:
        """Numpy types of what is stored for each channel: the logarithm of the step, perhaps the zero point."""
        return ("<f4",) if self.zeros in ("middle", "zero") else ("<f4", self.zeros)

    @property
    def layout(self) -> ChannelLayout:
        """Where the channels of the weight lie; one channel if it has one step."""
        codes = self.codes or Codes((), "")
        return ChannelLayout(self.channels or 1, codes.dim, codes.groups)

    def parts(self) -> list[tuple[Tensor, int, int]]:
        """For each width but 0: channels of the weight, number of their codes, width."""
        if self.codes is None:
            return []
        bits = self.bits.reshape(-1)
        of_a_channel = math.prod(self.codes.shape) // len(bits)
        found = ((int(w), (bits == w).nonzero().flatten()) for w in bits.unique().tolist() if w)
        return [(channels, of_a_channel * len(channels), width) for width, channels in found]

    @property
    def by_width(self) -> dict[int, int]:
        """Number of channels of each width; no tensor is made to know it."""
        each = 1 if self.channels is None or len(self.widths) > 1 else self.channels
        return {WIDTH_LETTERS.index(c): each * count for c, count in Counter(self.widths).items()}

    @property
    def codes_by_width(self) -> dict[int, int]:
        """Number of codes of each width but 0."""
        of_a_channel = 0 if self.codes is None else self.codes.count // (self.channels or 1)
        return {width: of_a_channel * count for width, count in self.by_width.items() if width and of_a_channel}

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of what is stored for the channels, and of the codes."""
        kept = sum(count for width, count in self.by_width.items() if width)
        state = kept * sum(np.dtype(kind).itemsize for kind in self.stored_types)
        return state, packed_size([(count, width) for width, count in self.codes_by_width.items()])

    def spec(self) -> QuantSpec:
        """The spec of such a quantizer."""
        widths = tuple(int(b) for b in self.bits.flatten().tolist())
        bits = widths if self.channels is not None and len(set(widths)) > 1 else widths[0]
        signed = True if self.key.endswith(WEIGHT) or self.codes is not None else None
        return QuantSpec(bits, per_channel=self.channels is not None, symmetric=self.symmetric, signed=signed)

    @classmethod
    def of(cls, key: str, quantizer: Quantizer, codes: Codes | None) -> tuple["Grid", Tensor]:
        """What there is to say of a quantizer, and the zero points that it rounds with."""
        zero_point = settled_zero_point(quantizer).cpu()
        bits = quantizer.bits.detach().cpu()
        channels = None if bits.ndim == 0 else bits.numel()
        widths = "".join(WIDTH_LETTERS[int(b)] for b in bits.flatten().tolist())
        if torch.equal(zero_point, middle(bits)):
            zeros = "middle"
        elif not zero_point.any():
            zeros = "zero"
        else:
            values = zero_point.double().numpy()
            zeros = next(t for t in ("|u1", "<i2", "<f4") if (values.astype(t).astype("f8") == values).all())
        symmetric = quantizer.is_weight if quantizer.spec is None else quantizer.spec.symmetric
        widths = widths[:1] if len(set(widths)) == 1 else widths
        return cls(key, widths, channels, zeros, symmetric, codes), zero_point


@dataclass(frozen=True)
class Other:
    """A tensor that is kept as it is."""

    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


def text_of(shape: tuple[int, ...]) -> str:
    """A shape as it stands in an index: "4,3"; "" is a scalar's."""
    return ",".join(map(str, shape))


def sizes_of(text: str) -> tuple[int, ...]:
    """The inverse of `text_of`."""
    return tuple(map(size_of, text.split(","))) if text else ()


def size_of(text: str) -> int:
    """A size, no larger than those of tensors."""
    if not (text.isascii() and text.isdecimal() and len(text) < 17):
        raise ValueError(f"{text[:40]!r} is no size")
    return int(text)


def dtype_of(name: str) -> str:
    """`name`, if torch has such a type of tensors; else a ValueError."""
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return name
