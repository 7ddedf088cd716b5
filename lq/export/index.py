"""What a packed file holds, in order: grids of quantizers and of what weights, tensors that are kept as they are."""

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lq.attachment.sites import INPUT, OUTPUT
from lq.errors import DataError
from lq.export.integers import settled_zero_point
from lq.export.packing import packed_size
from lq.files import decompress, parse_json, schema
from lq.quantizer.levels import middle
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.spec import WIDTHS, QuantSpec
from lq.structure.channels import ChannelLayout

#: Where a state dict has the float weight of a layer, and the quantizer of it.
ORIGINAL, WEIGHT = "parametrizations.weight.original", "parametrizations.weight.0"

# Widths as characters, so that those of many channels are a short string; those that there are.
_WIDTHS = "0123456789abcdefg"
_KNOWN = frozenset(_WIDTHS[width] for width in WIDTHS)

# Largest text of an index, in bytes, and most channels of quantizers whose weight is stored elsewhere.
_TEXT, _CHANNELS = 1 << 24, 1 << 24

# Zero points: those that need not be stored, and the types of those that are; capitals where the zero is fixed.
_ZEROS = {"middle": "m", "zero": "z", "|u1": "b", "<i2": "h", "<f4": "f"}
_KINDS = {letter: zeros for zeros, letter in _ZEROS.items()}

# Ends of quantizers' names.
_ENDS = {f".{WEIGHT}": ":w", f".{INPUT}": ":i", f".{OUTPUT}": ":o"}


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
        stride = "" if self.stride is None else _text(self.stride)
        return f"{self.offset}/{stride}/{_text(self.shape)}/{self.key}"

    @classmethod
    def of(cls, text: str) -> "Part":
        """The inverse of `text`."""
        offset, stride, shape, key = text.split("/", 3)
        return cls(key, _numbers(shape), _number(offset), _numbers(stride) if stride else None)


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
        return f"{_text(self.shape)}/{self.dtype}/{self.dim}/{self.groups}{part}"

    @classmethod
    def of(cls, text: str) -> "Codes":
        """The inverse of `text`."""
        shape, dtype, dim, groups, *part = text.split("/", 4)
        return cls(_numbers(shape), _dtype(dtype), _number(dim), _number(groups), Part.of(part[0]) if part else None)


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
        found = torch.tensor([float(_WIDTHS.index(c)) for c in self.widths])
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
        return {_WIDTHS.index(c): each * count for c, count in Counter(self.widths).items()}

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
        widths = "".join(_WIDTHS[int(b)] for b in bits.flatten().tolist())
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


@dataclass
class Index:
    """What a file holds.

    Args:
        grids: quantizers.
        others: what is not quantized.
        aliases: keys of a state dict under which a tensor is there once more.
        texts: small states of other kinds.
    """

    grids: list[Grid] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all that it lists."""
        return sum(map(sum, (grid.sizes for grid in self.grids))) + sum(other.size for other in self.others)

    def keys(self) -> Iterator[str]:
        """Keys of the state dict, without other names of the same."""
        for grid in self.grids:
            yield from (f"{grid.key}.{part}" for part in ("log2_step", "zero_point", "bits"))
            if grid.codes is not None and grid.codes.part is None:
                yield grid.weight_key
        yield from {grid.codes.part.key: None for grid in self.grids if grid.codes and grid.codes.part}
        yield from (other.key for other in self.others)
        yield from self.texts

    def encode(self) -> bytes:
        """As bytes: a text for each property of all quantizers, then of all others.

        Alike things next to each other compress well: names and all take a few hundred bytes.
        """
        grids, others = self.grids, self.others
        letters = "".join(_ZEROS[g.zeros].upper() if g.symmetric else _ZEROS[g.zeros] for g in grids)
        columns = [
            _joined(_short(grid.key) for grid in grids),
            _joined(grid.widths for grid in grids),
            letters,
            _joined("" if grid.channels is None else str(grid.channels) for grid in grids),
            _joined("" if grid.codes is None else grid.codes.text for grid in grids),
            _joined(other.key for other in others),
            _joined(_text(other.shape) for other in others),
            _joined(other.dtype for other in others),
        ]
        text = json.dumps([len(grids), len(others), *columns, self.aliases, self.texts], separators=(",", ":"))
        return zlib.compress(text.encode(), 9)

    @classmethod
    def decode(cls, data: bytes) -> "Index":
        """The inverse of `encode`.

        Raises:
            DataError: if that is not an index.
        """
        try:
            grids, others, *columns, aliases, texts = schema.read(parse_json(decompress(data, _TEXT)), _entries)
            keys, widths, letters, channels, codes, *of_others = columns
            rows = zip(
                *(_split(column, grids) for column in (keys, widths)),
                letters,
                *(_split(column, grids) for column in (channels, codes)),
                strict=True,
            )
            found = cls(aliases=aliases, texts=texts)
            for key, width, letter, count, code in rows:
                zeros = _KINDS[letter.lower()]
                weight = Codes.of(code) if code else None
                grid = Grid(_long(key), width, _number(count) if count else None, zeros, letter.isupper(), weight)
                _require_possible(grid)
                found.grids.append(grid)
            for key, shape, dtype in zip(*(_split(column, others) for column in of_others), strict=True):
                found.others.append(Other(key, _numbers(shape), _dtype(dtype)))
            found._require_consistent()
            return found
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            raise DataError(f"its index cannot be read ({kind}{error})") from error

    def _require_consistent(self) -> None:
        """Raise if a key is there twice, an alias stands for none, or there are more channels than a model has."""
        known: set[str] = set()
        for key in self.keys():
            if key in known:
                raise ValueError(f"{key!r} is there twice")
            known.add(key)
        for key, first in self.aliases.items():
            if key in known or first not in known:
                raise ValueError(f"{key!r} is another name of {first!r}, which is not there, or is there itself")
        if sum(grid.channels or 1 for grid in self.grids if grid.codes is None) > _CHANNELS:
            raise ValueError(f"quantizers of more than {_CHANNELS} channels")


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(texts)


def _split(text: str, count: int) -> list[str]:
    found = text.split("\n") if count else []
    if len(found) != count:
        raise ValueError(f"a column has {len(found)} entries, not {count}")
    return found


def _short(key: str) -> str:
    for end, letter in _ENDS.items():
        if f".{key}".endswith(end):
            return f".{key}".removesuffix(end)[1:] + letter
    return key


def _long(key: str) -> str:
    for end, letter in _ENDS.items():
        if key.endswith(letter):
            return (key.removesuffix(letter) + end).lstrip(".")
    return key


def _text(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_number, text.split(","))) if text else ()


def _number(text: str) -> int:
    """A size, no larger than those of tensors."""
    if not (text.isascii() and text.isdecimal() and len(text) < 17):
        raise ValueError(f"{text[:40]!r} is no size")
    return int(text)


def _entries(value: Any) -> list[Any]:
    """The parts of an index: numbers of quantizers and others, columns of texts, aliases, texts."""
    texts = schema.mapping(schema.text)
    parts: list[Any] = schema.array(lambda part: part, least=12, most=12)(value)
    checks = [schema.integer(), schema.integer(), *[schema.text] * 8, texts, texts]
    return [check(part) for check, part in zip(checks, parts, strict=True)]


def _require_possible(grid: Grid) -> None:
    """Raise if there can be no such quantizer."""
    count, codes = grid.channels, grid.codes
    if not _KNOWN.issuperset(grid.widths) or count == 0 or len(grid.widths) not in (1, count):
        raise ValueError(f"{grid.key!r} has {len(grid.widths)} widths {grid.widths[:8]!r} for {count or 1} channels")
    if codes is None:
        return
    sizes = codes.shape[codes.dim : codes.dim + 1]
    grouped = codes.groups > 1 and codes.dim == 1 and codes.shape[0] % codes.groups == 0
    of_weight = grid.key.endswith(WEIGHT) or codes.part is not None
    if not of_weight or not (codes.groups == 1 or grouped):
        raise ValueError(f"{grid.key!r} has codes of the layout {codes.text!r}, which no weight has")
    if count is not None and (not sizes or sizes[0] * codes.groups != count):
        raise ValueError(f"{grid.key!r} has {count} channels, and its weight the layout {codes.text!r}")


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return name
