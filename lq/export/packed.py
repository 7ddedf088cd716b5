"""Packed files: a quantized model in as many bytes as its widths say, as safetensors, from which nothing is executed.

A file has two byte tensors: ``index`` says what there is (`lq.export.index`), ``data`` has it, in that order: of each
quantizer the logarithms of its steps and, if they follow neither from the width nor are zero, its zero points; what is
not quantized, as it is; of each weight the codes, channels of a width together (`lq.export.packing`). Pruned channels
take nothing. Parameters that functions multiply by come from the codes of their parts. The last 16 bytes are a checksum
(BLAKE2b) of the metadata, the index and the data. Little endian.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lq.attachment.checkpoint import rebuild, require_fit
from lq.attachment.preparation.stored import is_marker
from lq.attachment.running import CALLS
from lq.attachment.sites import float_weight, require_attached
from lq.attachment.stored import read_from, stay_float, stored_weights
from lq.errors import DataError
from lq.export.entries import ORIGINAL, WEIGHT, Codes, Grid, Other, Part
from lq.export.index import Index
from lq.export.integers import as_integers, quantized_weights
from lq.export.packing import pack, unpack
from lq.files import require_file, whole_file
from lq.quantizer.final_widths import warn_if_unfinished
from lq.quantizer.levels import middle
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.rounding import step_size
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout
from lq.structure.sources import Source

M = TypeVar("M", bound=nn.Module)

#: Version of the format; files of a newer one are refused. Files get the oldest one that they can have: 2 if they hold
#: codes of weights that functions use.
FORMAT = 2

#: How the name of a packed file ends.
SUFFIX = ".safetensors"

_DIGEST = 16

# What readers raise where a header or an index says what cannot be.
_UNREADABLE = (AttributeError, TypeError, ValueError, LookupError, RuntimeError, ArithmeticError)


def save(model: nn.Module, path: str | Path) -> int:
    """Write a quantized model to a file as small as its widths, which `lq.load` reads.

    Weights are stored as codes of their true width, with steps, zero points and the ranges of activations;
    everything else as it is. Weights that functions use (of ``nn.MultiheadAttention``, of recurrent layers) are stored
    as codes too if the parameter that they are, or are parts of, is used by such functions only; a warning names those
    that stay float. An existing file is replaced when the new one is complete.

    Args:
        model: a model whose quantizers have their ranges.
        path: name of the file, ending in ".safetensors".

    Returns:
        Size of the file in bytes.

    Raises:
        StateError: if the model has no quantizers, one of them no range, or widths are still being learned.
        DataError: if the name has another ending, or a part of the model's state is not a tensor.

    >>> import tempfile, lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(64, 64)), weights=2, first_last=None)
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> size = lq.save(model, path)  # 64 x 64 weights of 2 bits, 64 steps, 64 biases, and what says so
    >>> size - 64 * (64 * 2 // 8 + 4 + 4) < 500
    True
    >>> torch.equal(lq.load(path, nn.Sequential(nn.Linear(64, 64)))[0].weight, model[0].weight)
    True
    """
    require_attached(model, "lq.save")
    warn_if_unfinished(model, f"{type(model).__name__}, which is saved,")
    path = packed_path(path)
    content = _Content(model)
    if left := stay_float(model):
        warnings.warn(f"{path}: {left}", UserWarning, stacklevel=2)
    index, size = content.index.encode(), content.index.size + _DIGEST
    metadata = _metadata(FORMAT if any(g.codes and g.codes.part for g in content.index.grids) else 1)
    header = {
        "__metadata__": metadata,
        "index": {"dtype": "U8", "shape": [len(index)], "data_offsets": [0, len(index)]},
        "data": {"dtype": "U8", "shape": [size], "data_offsets": [len(index), len(index) + size]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Written by hand, one tensor after the other, because safetensors wants all of them in memory.
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + index)
        digest = _digest(metadata, index)
        for part in content.parts():
            file.write(part)
            digest.update(part)
        file.write(digest.digest())
        return file.tell()


def load(path: str | Path, model: M) -> M:
    """Load a packed file into the model it was saved from, as the float code builds it; `lq.load` calls this.

    Raises:
        DataError: if the file is damaged, is no packed one or of a newer lq, or if the model is another one. The model
            is not touched then.
    """
    index, data = read_index(path)
    with _reading(path):
        _require_fit(model, index, path)
        state = _Reader(index, data).state_dict()
    rebuild(model, state)
    model.load_state_dict(state)
    grids = {grid.key: grid for grid in index.grids}
    for key, module in model.named_modules(remove_duplicate=False):
        if key in grids and isinstance(module, Quantizer):
            module.spec = grids[key].spec()
            module.refresh()
            if isinstance(module, WeightQuantizer) and (source := _source(grids[key])) is not None:
                read_from(module, source)
    return model


def read_index(path: str | Path) -> tuple[Index, NDArray[np.uint8]]:
    """What a packed file holds, and its bytes; memory is taken for no more than the file has.

    Raises:
        DataError: if the file is damaged, is no packed one or of a newer lq.
    """
    from safetensors import safe_open

    path = packed_path(path)
    with _reading(path):
        with safe_open(require_file(path), "np") as file:
            metadata = file.metadata() or {}
            _require_format(metadata)
            if sorted(file.keys()) != ["data", "index"]:
                raise DataError(f"it holds {sorted(file.keys())}, not ['data', 'index']")
            index_bytes, data = file.get_tensor("index"), file.get_tensor("data")
        if index_bytes.dtype != np.uint8 or data.dtype != np.uint8 or data.ndim != 1:
            raise DataError("its tensors are not bytes")
        digest = _digest(metadata, index_bytes.tobytes())
        digest.update(data[:-_DIGEST])
        if digest.digest() != data[-_DIGEST:].tobytes():
            raise DataError("its checksum does not fit its content")
        index = Index.decode(index_bytes.tobytes())
        if index.size != len(data) - _DIGEST:
            raise DataError(f"its index lists {index.size} bytes, there are {len(data) - _DIGEST}")
        return index, data


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Make one error of what readers raise for a file that is not as it should be; errors that name it stay."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, *_UNREADABLE) as error:
        if isinstance(error, DataError) and str(path) in str(error):
            raise
        raise DataError(f"{path} cannot be loaded: {error}; save the model again with lq.save, or update lq") from error


def packed_path(path: str | Path) -> Path:
    """The path, if it ends as it should."""
    if Path(path).suffix != SUFFIX:
        raise DataError(f"{path} should end in {SUFFIX!r}: packed models are safetensors files")
    if not Path(path).parent.is_dir():
        raise DataError(f"there is no folder {Path(path).parent}")
    return Path(path)


class _Content:
    """What goes into a file."""

    def __init__(self, model: nn.Module) -> None:
        self.index = Index()
        self._states: list[bytes] = []
        self._others: list[Tensor] = []
        self._weights: list[tuple[Grid, WeightQuantizer, Tensor]] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        quantizers = {key: module for key, module in modules.items() if isinstance(module, Quantizer)}
        shared = _shared(model)
        weights: dict[int, Tensor] = {id(q): w for _, q, w in quantized_weights(model) if id(w) not in shared}
        parts: dict[int, Part] = {}
        for call in stored_weights(model):
            if call.weight is not None and call.source is not None and call.parameter is not None:
                weights[id(call.quantizer)] = call.weight
                shape = tuple(call.parameter.shape)
                parts[id(call.quantizer)] = Part(call.key, shape, call.source.offset, call.source.stride)
        keys: dict[int, str] = {}
        for key, quantizer in quantizers.items():
            if keys.setdefault(id(quantizer), key) == key:
                self._add(key, quantizer, weights.get(id(quantizer)), parts.get(id(quantizer)))
        known = {f"{key}.{part}" for key in quantizers for part in ("log2_step", "zero_point", "bits")}
        known |= {grid.weight_key for grid, *_ in self._weights}
        first: dict[int, str] = {}
        for key, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise DataError(f"{key} is a {type(value).__name__}; a packed file holds tensors only")
            if is_marker(key) and value.is_floating_point():
                continue  # only float checkpoints need them
            if "\n" in key:
                raise DataError(f"{key!r} has a line end in its name; rename the module")
            if first.setdefault(id(value), key) != key:
                self.index.aliases[key] = first[id(value)]
            elif key.endswith("_extra_state") and value.dtype == torch.uint8 and value.ndim == 1:
                self.index.texts[key] = bytes(value.tolist()).decode("latin-1")
            elif key not in known:
                self.index.others.append(Other(key, tuple(value.shape), _name(value)))
                self._others.append(value)

    def _add(self, key: str, quantizer: Quantizer, weight: Tensor | None, part: Part | None) -> None:
        codes = None
        if isinstance(quantizer, WeightQuantizer) and weight is not None:
            codes = Codes(tuple(weight.shape), _name(weight), quantizer.layout.dim, quantizer.layout.groups, part)
        grid, zero_point = Grid.of(key, quantizer, codes)
        self.index.grids.append(grid)
        for values, kind in zip((quantizer.log2_step.detach().cpu(), zero_point), grid.stored_types, strict=False):
            self._states.append(values[grid.kept].numpy().astype(kind).tobytes())
        if isinstance(quantizer, WeightQuantizer) and weight is not None:
            self._weights.append((grid, quantizer, weight))

    def parts(self) -> Iterator[bytes]:
        """The bytes of the data, in order."""
        yield from self._states
        for tensor in self._others:
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for grid, quantizer, weight in self._weights:
            found = as_integers(quantizer, weight).codes.cpu()
            rows = grid.layout.rows(found) if grid.channels else found.reshape(1, -1)
            wide = np.uint8 if found.dtype == torch.uint8 else np.uint16
            yield pack([(rows[c].reshape(-1).numpy().astype(wide), width) for c, _, width in grid.parts()])


class _Reader:
    """Takes the data apart."""

    def __init__(self, index: Index, data: NDArray[np.uint8]) -> None:
        self.index = index
        self.data = data
        self.position = 0

    def state_dict(self) -> dict[str, Tensor]:
        """The state dict of the quantized model."""
        state: dict[str, Tensor] = {}
        for grid in self.index.grids:
            state |= self._state(grid)
        for other in self.index.others:
            raw = torch.from_numpy(self._take(other.size).copy())
            dtype = getattr(torch, other.dtype)
            empty = torch.empty(other.shape, dtype=dtype)
            state[other.key] = raw.view(dtype).view(other.shape) if other.size else empty
        self._require_whole_parameters()
        for grid in self.index.grids:
            if grid.codes is not None:
                weight, part = self._weight(grid, grid.codes, state), grid.codes.part
                if part is not None:
                    whole = state.setdefault(part.key, torch.zeros(part.shape, dtype=weight.dtype))
                    _part(grid.codes, part).view(whole).copy_(weight)
                else:
                    state[grid.weight_key] = weight
        for key, text in self.index.texts.items():
            state[key] = _bytes(text)
        state |= {key: state[first] for key, first in self.index.aliases.items()}
        of_weights = [key for key in state if f".{key}".rpartition(".")[0].endswith(f".{WEIGHT}")]
        return {key: state[key] for key in of_weights} | state  # in a module, its weight's quantizer comes first

    def _require_whole_parameters(self) -> None:
        """Raise if parts of parameters are not in them, or are not all of them."""
        left: dict[str, int] = {}
        for codes in (grid.codes for grid in self.index.grids if grid.codes is not None):
            part = codes.part
            if part is not None:
                whole = torch.empty(part.shape, dtype=getattr(torch, codes.dtype), device="meta")
                if min(*part.shape, *codes.shape, *(part.stride or ()), 0) < 0 or not _part(codes, part).fits(whole):
                    raise DataError(f"{part.key} has a part that is not in it")
                left[part.key] = left.get(part.key, whole.numel()) - math.prod(codes.shape)
        if wrong := [key for key, count in left.items() if count]:
            raise DataError(f"the parts of {wrong[0]} are not all of it")

    def _take(self, size: int) -> NDArray[np.uint8]:
        self.position += size
        return self.data[self.position - size : self.position]

    def _state(self, grid: Grid) -> dict[str, Tensor]:
        bits, kept = grid.bits, grid.kept
        log2_step = torch.zeros_like(bits)
        zero_point = middle(bits) if grid.zeros == "middle" else torch.zeros_like(bits)
        for values, kind in zip((log2_step, zero_point), grid.stored_types, strict=False):
            found = self._take(int(kept.sum()) * np.dtype(kind).itemsize).view(kind)
            if np.isnan(found).any() or (found == np.inf).any():  # -inf: calibration did not come there
                raise DataError(f"the steps or zero points of {grid.key!r} are no finite numbers")
            values[kept] = torch.from_numpy(found.astype("f4"))
        return {f"{grid.key}.log2_step": log2_step, f"{grid.key}.zero_point": zero_point, f"{grid.key}.bits": bits}

    def _weight(self, grid: Grid, codes: Codes, state: dict[str, Tensor]) -> Tensor:
        """The values that the codes stand for, as float weight."""
        rows = torch.zeros(grid.channels or 1, math.prod(codes.shape) // (grid.channels or 1))
        parts = grid.parts()
        data = self._take(grid.sizes[1])
        for (channels, _, _), found in zip(parts, unpack(data, [part[1:] for part in parts]), strict=True):
            rows[channels] = torch.from_numpy(found.astype("f4")).view(len(channels), -1)
        step, zero_point = (state[f"{grid.key}.{part}"].view(-1, 1) for part in ("log2_step", "zero_point"))
        rows = (rows - zero_point) * step_size(step)
        weight = grid.layout.from_rows(rows, codes.shape) if grid.channels else rows.view(codes.shape)
        return weight.to(getattr(torch, codes.dtype))


def _require_fit(model: nn.Module, index: Index, path: str | Path) -> None:
    """Raise if the file's tensors are not those of the model; known from the index, before any is made."""
    shapes: dict[str, Any] = {other.key: other.shape for other in index.others}
    stored = [(grid.weight_key, grid.codes) for grid in index.grids if grid.codes is not None]
    shapes |= {key: codes.shape if codes.part is None else codes.part.shape for key, codes in stored}
    of_grids = {f"{grid.key}.{part}": grid for grid in index.grids for part in ("log2_step", "zero_point", "bits")}
    shapes |= {key: () if grid.channels is None else (grid.channels,) for key, grid in of_grids.items()}
    shapes |= {key: _bytes(text) if is_marker(key) else (len(text),) for key, text in index.texts.items()}
    shapes |= {key: shapes[first] for key, first in index.aliases.items()}
    require_fit(model, shapes, str(path))
    for grid in index.grids:
        if grid.channels and grid.codes and grid.codes.part is None:
            name = grid.weight_key.replace(ORIGINAL, "").rstrip(".")
            module = model.get_submodule(name)
            weight = float_weight(module)
            if weight is None or ChannelLayout.of(module, weight) != grid.layout:
                raise DataError(f"{path}: {name}.weight has its channels elsewhere; build the model that was saved")


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode("latin-1")), dtype=torch.uint8)


def _part(codes: Codes, part: Part) -> Source:
    """The source of a weight of a function."""
    channels = codes.shape[codes.dim] * codes.groups if codes.shape else 1
    return Source(part.key, codes.shape, channels, codes.dim, codes.groups, part.offset, part.stride)


def _source(grid: Grid) -> Source | None:
    """That source, as the quantizer knows it: by the parameter's name in the module that makes the call."""
    if grid.codes is None or grid.codes.part is None:
        return None
    owner = f".{grid.key}".rpartition(f".{CALLS}.")[0][1:]
    key = grid.codes.part.key
    return replace(_part(grid.codes, grid.codes.part), parameter=key.removeprefix(f"{owner}.") if owner else key)


def _shared(model: nn.Module) -> set[int]:
    """Identities of weights that two layers quantize differently, or only one of them: these stay float."""
    quantizers = {f"{name}.{ORIGINAL}".lstrip("."): id(q) for name, q, _ in quantized_weights(model)}
    uses: dict[int, set[int | None]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        uses.setdefault(id(value), set()).add(quantizers.get(key))
    return {identity for identity, found in uses.items() if len(found) > 1}


def _metadata(version: int) -> dict[str, str]:
    import lq

    return {"format": f"lq packed {version}", "lq": lq.__version__}


def _require_format(metadata: dict[str, str]) -> None:
    words = metadata.get("format", "").rsplit(" ", 1)
    if words[0] != "lq packed" or not words[-1].isdecimal():
        raise DataError("it is no file of lq.save (a plain safetensors file goes to model.load_state_dict)")
    if int(words[-1]) > FORMAT:
        raise DataError(
            f"it has format {words[-1]} (lq {metadata.get('lq', '?')}), this lq reads formats up to {FORMAT}"
        )


def _digest(metadata: dict[str, str], index: bytes) -> Any:
    text = json.dumps(metadata, sort_keys=True).encode()
    return hashlib.blake2b(text + index, digest_size=_DIGEST)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
