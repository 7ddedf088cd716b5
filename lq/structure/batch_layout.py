"""Where the samples of batches lie: told by input, labels and output together, and checked by running the model.

A sequence may come time first, a batch as a list of images; what looks like the number of samples may be one of time
steps, edges or channels. So the model is run on the first two samples, and on each of them alone: rows of its output
have to come and go with the samples, and be the same in company as alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lq.errors import DataError
from lq.structure.samples import Path, batch_size, dimension_of, is_label, is_nested, length, part_at, parts, take

# How far the output of a sample may be from what it is in a batch, relative to the largest: rounding is below, another
# sample above.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 2e-2
# What a model or a loss may raise when it is given what is no batch.
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
# Arguments that say more than lq can find out.
_HINT = (
    "pass batch_dim=, the dimension of inputs in which samples lie, or forward=, a callable that is given the model "
    "and a batch and returns an output with one row for each sample"
)


@dataclass(frozen=True)
class Layout:
    """Where samples lie.

    Args:
        dim: the dimension of inputs.
        output_dim: the dimension of the output.
        counted: the part of a batch whose length in a dimension is the number of samples; None: what most parts agree
            on.
        lists: whether a list of as many tensors is one of samples even if these have as many rows each.
        note: what is particular about them.
    """

    dim: int = 0
    output_dim: int = 0
    counted: tuple[Path, int] | None = None
    lists: bool = False
    note: str = ""

    def size(self, batch: Any) -> int:
        """Number of samples of a batch.

        Raises:
            DataError: if it is made of other parts than the first one.
        """
        if self.counted is None:
            return batch_size(batch)
        path, dim = self.counted
        try:
            found = length(part_at(batch, path), dim)
        except KeyError:
            found = None
        if found is None:
            raise DataError(
                f"a batch of {_describe(batch)} is made of other parts than the first one; {_HINT}, or give batches "
                "that are alike"
            )
        return found

    def take(self, batch: Any, start: int, stop: int) -> Any:
        """Some samples as a batch."""
        return take(batch, start, stop, self.size(batch), self.dim, self.lists)

    def output(self, output: Tensor) -> Tensor:
        """The output with samples in the first dimension."""
        return output.movedim(self.output_dim, 0) if self.output_dim else output

    def labels(self, labels: Tensor, batch: Any) -> Tensor:
        """Labels with samples in the first dimension."""
        along = dimension_of(labels, self.size(batch), self.dim)
        return labels.movedim(along, 0) if along else labels


#: Samples in the first dimension of everything.
FIRST = Layout()


def find_layout(
    batch: Any, run: Callable[[Any], Any], batch_dim: int | None = None, *, is_loss: bool = False
) -> Layout:
    """Find out where the samples of batches like `batch` lie.

    Args:
        batch: the first batch.
        run: runs the model on a batch; returns its output, a tensor.
        batch_dim: the dimension of inputs in which samples are said to lie; None: it is found out.
        is_loss: `run` returns the mean loss of a batch instead.

    Raises:
        DataError: if input, labels and output do not agree on what a sample is.
    """
    possible: list[tuple[Layout, bool]] = []  # rows come and go with samples; whether they are the same alone
    error: Exception | None = None
    for layout in _candidates(batch, batch_dim):
        try:
            found = _tried(batch, layout, run, is_loss)
        except _ERRORS as raised:
            error = error or raised
            continue
        if found is not None:
            possible.append(found)
            if found[1]:
                return found[0]
    sizes = {layout.size(batch) for layout, _ in possible}
    labels = {size for path, part, _ in parts(batch) if is_label(batch, path) and (size := length(part)) is not None}
    agreed = [layout for layout, _ in possible if layout.size(batch) in labels] if len(sizes) > 1 else []
    if len(possible) == 1 or agreed or (possible and batch_dim is not None):
        chosen = agreed[0] if agreed else possible[0][0]
        note = "a sample's output depends on the others in the batch, or on chance"
        return replace(chosen, note=note)
    if possible:
        raise DataError(
            f"it cannot be told what a sample is in a batch of {_describe(batch)}: {_several(sizes)} fit the output, "
            f"none gives the same output alone as in the batch; {_HINT}"
        )
    if error is not None and batch_dim is None and _is_plain(batch):
        raise error
    said = (
        f"batch_dim={batch_dim} does not fit" if batch_dim is not None else "input, labels and output do not agree on"
    )
    why = f" ({error})" if error is not None else ""
    raise DataError(f"{said} what a sample is in a batch of {_describe(batch)}{why}; {_HINT}") from error


def _candidates(batch: Any, batch_dim: int | None) -> Iterator[Layout]:
    """What samples could be: first what most parts agree on."""
    sources = [(path, part) for path, part, _ in parts(batch)]
    if not sources:
        yield FIRST  # of a kind that is not looked into: one sample
        return
    labels = [source for source in sources if is_label(batch, source[0])]
    inputs = [source for source in sources if not is_label(batch, source[0])]
    within = [((*path, i), p) for path, part in inputs if isinstance(part, (tuple, list)) for i, p in _tensors(part)]
    sources += within
    likely = batch_size(batch)
    known: set[tuple[int, tuple[int | None, ...]]] = set()
    if batch_dim is not None:
        given = [(path, part) for path, part in [*inputs, *within] if isinstance(part, Tensor)] or inputs
        counts = [(path, part, batch_dim) for path, part in given if length(part, batch_dim) is not None]
        dims: tuple[int, ...] = (batch_dim,)
    else:
        counts = [(path, part, 0) for path, part in [*labels, *inputs] if length(part) == likely]
        counts += [(path, part, 0) for path, part in labels]
        counts += [(path, part, dim) for dim in (0, 1) for path, part in inputs[:4]]
        counts += [(path, part, dim) for dim in (0, 1) for path, part in within[:4]]
        dims = (0, 1)
    for path, part, dim in counts:
        size = length(part, dim)
        if not size or (isinstance(part, (tuple, list)) and not is_nested(part) and size != likely):
            continue
        for along in dims:
            cut = size, tuple(dimension_of(p, size, along) if isinstance(p, Tensor) else None for _, p in sources)
            if cut not in known:
                known.add(cut)
                yield Layout(along, 0, (path, dim))
                if any(_may_be_samples(part, size) for _, part in sources):
                    yield Layout(along, 0, (path, dim), lists=True)


def _tried(batch: Any, layout: Layout, run: Callable[[Any], Any], is_loss: bool) -> tuple[Layout, bool] | None:
    """Run the first samples together and alone; None: it is not that."""
    count = min(layout.size(batch), 2)
    alone = [run(layout.take(batch, i, i + 1)) for i in range(count)]
    together = run(layout.take(batch, 0, count)) if count > 1 else alone[0]
    if is_loss:
        return layout, _close(torch.stack(alone).mean(0), together)
    for dim in dict.fromkeys((0, layout.dim, 1)):
        if together.ndim <= dim or any(one.ndim != together.ndim for one in alone):
            continue
        rows = [one.shape[dim] for one in alone]
        grows = sum(rows) == together.shape[dim] and len(set(rows)) == 1
        several = rows[0] != 1  # for each sample, such as the tokens of a text
        if not grows or (several and (dim or layout.counted is None)):
            continue
        if all(_is_alike(one, together, dim) for one in alone):
            is_same = _close(torch.cat(alone, dim), together) and not (several and count == 1)
            return replace(layout, output_dim=dim), is_same
    return None


def _tensors(part: Any) -> list[tuple[int, Tensor]]:
    """The tensors in a list, which may be several inputs of which samples lie in other dimensions than the first."""
    return [(i, value) for i, value in enumerate(part) if isinstance(value, Tensor) and value.ndim]


def _may_be_samples(part: Any, size: int) -> bool:
    """Whether a part is a list of as many tensors as there are samples, with as many rows each."""
    return isinstance(part, (tuple, list)) and len(part) == size and all(length(value) == size for value in part)


def _is_alike(one: Tensor, other: Tensor, dim: int) -> bool:
    return [s for d, s in enumerate(one.shape) if d != dim] == [s for d, s in enumerate(other.shape) if d != dim]


def _close(found: Tensor, expected: Tensor) -> bool:
    if not found.is_floating_point():
        return torch.equal(found, expected)
    tolerance = _HALF_TOLERANCE if found.dtype.itemsize < 4 else _TOLERANCE
    found, expected = (t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).double() for t in (found, expected))
    return not found.numel() or bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _is_plain(batch: Any) -> bool:
    """Whether all parts have the same length, so that samples cannot be anything else."""
    sizes = {length(part) for _, part, _ in parts(batch)}
    return len(sizes) <= 1


def _several(sizes: set[int]) -> str:
    return " and ".join(str(size) for size in sorted(sizes)) + " samples"


def _describe(batch: Any) -> str:
    from lq.structure.forward import describe

    return describe(batch)
