"""What a sample of a batch is: how many there are, and some of them as a batch of their own.

Batches are nested as users nest them: tensors, tuples, lists, mappings, dataclasses, packed sequences. Samples lie
along one dimension of each tensor, or are the elements of a list (images of several sizes, targets of a detector); what
has no dimension of that length is the same for all samples.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

#: Where a part of a batch is: the keys on the way to it.
Path = tuple[Any, ...]


def batch_size(batch: Any) -> int:
    """Number of samples that most parts of a batch agree on, labels counting twice; 1 if there are none.

    >>> batch_size([{"image": torch.zeros(7, 3)}])
    7
    >>> batch_size((torch.zeros(20, 16, 8), torch.zeros(16)))  # time first, and 16 labels
    16
    """
    scores: dict[int, float] = {}
    first = True
    for path, part, share in parts(batch):
        size = length(part)
        if size is None:
            continue
        is_list = isinstance(part, (tuple, list))
        weight = 1.5 if first else 1.0
        if is_list:  # a list of plain values may be anything, one of tensors with as many rows each several inputs
            weight = 1.0 if is_nested(part) and not _are_tensors_of_one_length(part) else 0.4
        first = first and is_list
        scores[size] = scores.get(size, 0.0) + share * (weight + (1.0 if is_label(batch, path) else 0.0))
    return max(scores, key=lambda size: scores[size], default=1)


def parts(batch: Any, path: Path = (), share: float = 1.0) -> Iterator[tuple[Path, Any, float]]:
    """Tensors, packed sequences and inner lists of a batch: the way there, the part, its share of the list it is in."""
    if isinstance(batch, (Tensor, PackedSequence)):
        yield path, batch, share
        return
    if path and _is_list(batch):
        yield path, batch, share
        if not _are_tensors_of_one_length(batch):
            return  # the elements are samples, or what belongs to one
        share /= len(batch)
    for key, part in _children(batch):
        yield from parts(part, (*path, key), share)


def length(part: Any, dim: int = 0) -> int | None:
    """Number of samples in a part if they lie along `dim`; None: it has no such dimension."""
    if isinstance(part, Tensor):
        return part.shape[dim] if part.ndim > dim else None
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    return len(part) if _is_list(part) else None


def part_at(batch: Any, path: Path) -> Any:
    """The part at the end of a way."""
    for key in path:
        batch = dict(_children(batch))[key]
    return batch


def is_label(batch: Any, path: Path) -> bool:
    """Whether a part belongs to the labels, the second part of a batch."""
    return isinstance(batch, (tuple, list)) and bool(path) and path[0] == 1


def is_nested(part: Any) -> bool:
    """Whether a list is one of tensors or of further parts, not of plain values."""
    return any(isinstance(value, (Tensor, Mapping, tuple, list)) or dataclasses.is_dataclass(value) for value in part)


def take(batch: Any, start: int, stop: int, size: int | None = None, dim: int = 0, lists: bool = False) -> Any:
    """Samples `start` to `stop` of a batch of any nesting.

    Args:
        batch: the batch.
        start: first sample.
        stop: the one behind the last.
        size: number of samples in the batch; by default what most of its parts agree on.
        dim: dimension in which samples lie where a tensor has as many there; else the first one that has.
        lists: whether a list of as many tensors is one of samples even if these have as many rows each.

    >>> take({"image": torch.arange(4), "scale": 2.0}, 1, 3)
    {'image': tensor([1, 2]), 'scale': 2.0}
    """
    size = batch_size(batch) if size is None else size
    return _taken(batch, start, stop, size, dim, lists, outermost=True)


def _taken(value: Any, start: int, stop: int, size: int, dim: int, lists: bool, outermost: bool = False) -> Any:
    if isinstance(value, PackedSequence):
        return pack_sequence(unpack_sequence(value)[start:stop], enforce_sorted=False)
    if isinstance(value, Tensor):
        along = dimension_of(value, size, dim)
        return value if along is None else value.narrow(along, start, stop - start)
    of_samples = not outermost and _is_list(value) and len(value) == size
    if of_samples and (lists or not _are_tensors_of_one_length(value, size)):
        return value[start:stop]
    return _rebuilt(value, lambda part, _: _taken(part, start, stop, size, dim, lists))


def join(first: Any, second: Any, size: int, other: int, dim: int = 0) -> Any:
    """Two batches, of `size` and `other` samples, as one; what is the same for all samples is the first one's.

    >>> join((torch.zeros(1, 2), 3.0), (torch.ones(2, 2), 3.0), 1, 2)[0].shape
    torch.Size([3, 2])
    """
    return _joined(first, second, size, other, dim, outermost=True)


def _joined(first: Any, second: Any, size: int, other: int, dim: int, outermost: bool = False) -> Any:
    if isinstance(first, PackedSequence):
        return pack_sequence(unpack_sequence(first) + unpack_sequence(second), enforce_sorted=False)
    if isinstance(first, Tensor):
        along = dimension_of(first, size, dim)
        if along is None or second.ndim <= along or second.shape[along] != other:
            return first
        return torch.cat([first, second], along)
    if not outermost and _is_list(first) and len(first) == size and not _are_tensors_of_one_length(first, size):
        return first + second
    theirs = dict(_children(second))
    return _rebuilt(first, lambda part, key: _joined(part, theirs[key], size, other, dim))


def dimension_of(tensor: Tensor, size: int, dim: int = 0) -> int | None:
    """The dimension of a tensor in which `size` samples lie: `dim` if it is that long, else 0 or 1; None: it has none.

    >>> dimension_of(torch.zeros(20, 16, 8), 16), dimension_of(torch.zeros(9, 9), 9, 1), dimension_of(torch.ones(3), 2)
    (1, 1, None)
    """
    return next((d for d in (dim, 0, 1) if d < tensor.ndim and tensor.shape[d] == size), None)


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence) and len(value) > 0


def _are_tensors_of_one_length(value: Any, size: int | None = None) -> bool:
    """Whether all elements are tensors with the same number of rows, as several inputs are."""
    lengths = {part.shape[0] if isinstance(part, Tensor) and part.ndim else None for part in value}
    return len(lengths) == 1 and None not in lengths and (size is None or lengths == {size})


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _rebuilt(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """The same container with other parts."""
    found = {key: change(part, key) for key, part in _children(value)}
    if not found:
        return value
    if isinstance(value, Mapping):
        if type(value) is dict:
            return found
        other = copy.copy(value)  # keeps what else a subclass has, such as a default factory
        for key, part in found.items():
            other[key] = part  # type: ignore[index]
        return other
    if isinstance(value, (tuple, list)):
        return type(value)(*found.values()) if hasattr(value, "_fields") else type(value)(found.values())
    other = copy.copy(value)
    for key, part in found.items():
        object.__setattr__(other, key, part)
    return other
