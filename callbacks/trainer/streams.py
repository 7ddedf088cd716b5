"""Loaders of any kind, read without a trace: what was read comes again, and random states are as they were.

Map-style data sets are indexed, iterable ones read through a copy. Generators and other iterators can be read once
only: they are wrapped, before the Trainer takes them, so that what was read of them is given back. What cannot be given
back (a data set that keeps an iterator inside, a generator that a ``train_dataloader`` hook returned) is told of.
"""

import copy
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch.utils import _pytree
from torch.utils.data import DataLoader, IterableDataset


class Returnable(Iterator[Any]):
    """An iterator that takes back what was read of it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.returned: deque[Any] = deque()

    def __next__(self) -> Any:
        return self.returned.popleft() if self.returned else next(self.source)

    @contextmanager
    def borrowed(self) -> Iterator[Iterator[Any]]:
        """What comes next; all of it comes again when the context ends."""
        taken: list[Any] = []

        def take() -> Iterator[Any]:
            for item in self:
                taken.append(item)
                yield item

        try:
            yield take()
        finally:
            self.returned.extendleft(reversed(taken))


def make_returnable(loop: Any) -> None:
    """Wrap the iterators that a loop of the Trainer was given as data and has not taken yet."""
    defined = getattr(loop, "_data_source", None)
    data = getattr(defined, "instance", None)
    if getattr(loop, "_combined_loader", None) is not None or data is None:
        return
    if isinstance(data, CombinedLoader):
        data.flattened = [_wrapped(loader) for loader in data.flattened]
    elif isinstance(data, (Iterator, list, tuple, dict)):
        defined.instance = _pytree.tree_map(_wrapped, data)  # type: ignore[union-attr]


def _wrapped(loader: Any) -> Any:
    return Returnable(loader) if isinstance(loader, Iterator) and not isinstance(loader, Returnable) else loader


def keeps_an_iterator(loader: Any) -> bool:
    """Whether reading takes away what is read: an iterator, or a data set that has one inside."""
    if isinstance(loader, Returnable):
        return False
    inside = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(inside, Iterator):
        return True
    streamed = isinstance(inside, IterableDataset) or not isinstance(loader, DataLoader)
    return streamed and any(isinstance(value, Iterator) for value in getattr(inside, "__dict__", {}).values())


@contextmanager
def reading(loader: CombinedLoader, title: str) -> Iterator[CombinedLoader]:
    """The loader, whose iterators get back what is read and whose random generators end as they were."""
    with ExitStack() as stack:
        stack.enter_context(same_generators(loader.flattened))
        parts = []
        for part in loader.flattened:
            if keeps_an_iterator(part):
                rank_zero_warn(
                    f"{title} reads from {_name(part)}, which can be read only once: training will not see these "
                    "samples. Give the Trainer data that can be read again, or set calibration data apart"
                )
            parts.append(stack.enter_context(part.borrowed()) if isinstance(part, Returnable) else part)
        loader.flattened = parts
        yield loader


def small_batch(loader: Any) -> Any:
    """The first batch of a loader, or one of two samples; None if there is none, or it could not be given back."""
    if isinstance(loader, Returnable):
        with loader.borrowed() as items:
            return next(items, None)
    if keeps_an_iterator(loader):
        rank_zero_warn(
            f"the module is not looked at with data of {_name(loader)}, which can be read only once; set "
            "example_input_array, or give the Trainer data that can be read again"
        )
        return None
    with same_generators([loader]):
        samples = _two_samples(loader) if isinstance(loader, DataLoader) else None
        return next(iter(loader), None) if samples is None else _collated(loader.collate_fn, samples)


def _two_samples(loader: DataLoader[Any]) -> list[Any] | None:
    """Two samples of what the loader puts in batches; None if only the loader itself knows how to read its data."""
    data: Any = loader.dataset
    if loader.batch_size is None or loader.batch_sampler is None:
        return None
    if isinstance(data, IterableDataset):
        return list(itertools.islice(copy.copy(data), min(2, loader.batch_size)))
    try:
        return [data[i] for i in range(min(2, len(data)))]
    except (TypeError, LookupError):  # no length, or other keys than numbers
        return None


def _collated(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    return collate(samples) if samples else None


def combined(parts: list[Any], loader: CombinedLoader) -> Any:
    """Batches of the loaders that `loader` is made of, as one of its own."""
    if mode_of(loader) == "sequential":
        return parts[0]
    return _pytree.tree_unflatten(parts, _pytree.tree_flatten(loader.iterables)[1])


def mode_of(loader: Any) -> Any:
    """How a `CombinedLoader` reads its parts; the Trainer's own way if there is none."""
    return getattr(loader, "_mode", "max_size_cycle")


def _name(loader: Any) -> str:
    return f"a {type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__}"


@contextmanager
def same_generators(loaders: Iterable[Any]) -> Iterator[None]:
    """Restore the random generators that loaders, samplers and data sets carry."""
    restore = []
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        for owner in [*owners, getattr(loader, "dataset", None)]:
            restore += [set_state for value in getattr(owner, "__dict__", {}).values() if (set_state := _state(value))]
    try:
        yield
    finally:
        for set_state in restore:
            set_state()


def _state(value: Any) -> Callable[[], Any] | None:
    """What sets a random generator back to the state it has now; None for anything else."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        inner = value.getstate()
        return lambda: value.setstate(inner)
    if isinstance(value, np.random.RandomState):
        old = value.get_state()
        return lambda: value.set_state(old)
    if isinstance(value, np.random.Generator):
        numbers = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", numbers)
    return None
