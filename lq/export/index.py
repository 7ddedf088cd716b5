"""What a packed file holds, in order: grids of quantizers and of what weights, tensors that are kept as they are."""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lq.attachment.sites import INPUT, OUTPUT
from lq.errors import DataError
from lq.export.entries import WEIGHT, WIDTH_LETTERS, Codes, Grid, Other, dtype_of, size_of, sizes_of, text_of
from lq.files import decompress, parse_json, schema
from lq.quantizer.spec import WIDTHS

_KNOWN = frozenset(WIDTH_LETTERS[width] for width in WIDTHS)

# Largest text of an index, in bytes, and most channels of quantizers whose weight is stored elsewhere.
_TEXT, _CHANNELS = 1 << 24, 1 << 24

# Zero points: those that need not be stored, and the types of those that are; capitals where the zero is fixed.
_ZEROS = {"middle": "m", "zero": "z", "|u1": "b", "<i2": "h", "<f4": "f"}
_KINDS = {letter: zeros for zeros, letter in _ZEROS.items()}

# Ends of quantizers' names.
_ENDS = {f".{WEIGHT}": ":w", f".{INPUT}": ":i", f".{OUTPUT}": ":o"}


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
            _joined(text_of(other.shape) for other in others),
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
                grid = Grid(_long(key), width, size_of(count) if count else None, zeros, letter.isupper(), weight)
                _require_possible(grid)
                found.grids.append(grid)
            for key, shape, dtype in zip(*(_split(column, others) for column in of_others), strict=True):
                found.others.append(Other(key, sizes_of(shape), dtype_of(dtype)))
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
