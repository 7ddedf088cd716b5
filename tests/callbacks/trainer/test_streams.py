"""Loaders of every kind: read to look at and to calibrate, and training sees what it would have seen."""

import copy
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lq.attachment.sites import quantizers
from lq.callbacks import Quantize
from lq.callbacks.trainer.streams import Returnable, small_batch
from lq.errors import DataError
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, tiny

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:Your .IterableDataset. has .__len__. defined:UserWarning"),
]

EPOCH = dict(max_epochs=1, limit_train_batches=4)  # noqa: C408


class Stream(IterableDataset):
    """Without a length."""

    def __init__(self, endless=False):
        self.endless = endless

    def __iter__(self):
        yield from dataset()
        while self.endless:
            yield from dataset()


class Sized(Stream):
    def __len__(self):
        return 32


class Batches(Stream):
    """Yields whole batches."""

    def __iter__(self):
        yield from loader()


class Shuffled(Stream):
    """Draws from generators of its own."""

    def __init__(self):
        super().__init__()
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.old, self.torch = np.random.RandomState(1), torch.Generator().manual_seed(1)

    def __iter__(self):
        data = dataset()
        for _ in range(32):
            i = self.python.randrange(8) + self.numpy.integers(8) + self.old.randint(8)
            yield data[int(i) + int(torch.randint(8, (), generator=self.torch))]


class Keyed(Dataset):
    """Samples by other keys than numbers."""

    def __getitem__(self, key):
        return dataset()[{"a": 0, "b": 1}[key]]


class Part(Tiny):
    """Takes one of several loaders' batches."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch[0], batch_idx)


class Plain:
    """No DataLoader: whatever can be iterated over again."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


class Seen(pl.Callback):
    """Notes what training gets."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


def generator():
    yield from loader()


KINDS = {
    "stream": (Tiny, lambda: DataLoader(Stream(), 8)),
    "stream with a length": (Tiny, lambda: DataLoader(Sized(), 8)),
    "endless": (Tiny, lambda: DataLoader(Stream(endless=True), 8)),
    "batches": (Tiny, lambda: DataLoader(Batches(), batch_size=None)),
    "with generators of its own": (Tiny, lambda: DataLoader(Shuffled(), 8)),
    "keyed": (Tiny, lambda: DataLoader(Keyed(), batch_sampler=[["a", "b"]] * 4)),
    "map-style batches": (Tiny, lambda: DataLoader(list(loader()), batch_size=None)),
    "any iterable": (Tiny, lambda: Plain(list(loader()))),
    "generator": (Tiny, generator),
    "iterator": (Tiny, lambda: iter(list(loader()))),
    "dict": (Part, lambda: {"a": loader(), "b": loader(16, batch=4)}),
    "list of loaders": (Part, lambda: [loader(), loader(16)]),
    "dict with a generator": (Part, lambda: {"a": generator(), "b": loader(16, batch=4)}),
    "min_size": (Part, lambda: CombinedLoader({"a": loader(), "b": loader(16)}, "min_size")),
    "max_size_cycle": (Part, lambda: CombinedLoader({"a": loader(), "b": generator()}, "max_size_cycle")),
    "max_size": (Part, lambda: CombinedLoader({"a": loader(), "b": loader(16)}, "max_size")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_what_it_would_have_seen(kind):
    make, data = KINDS[kind]
    module, plain, seen = tiny_of(make), Seen(), Seen()
    fit(tiny_of(make), [plain], data(), **EPOCH)
    fit(module, [Quantize(4, 4, calibration_samples=16), seen], data(), **EPOCH)
    assert all(quantizer.calibrated for quantizer in quantizers(module))
    assert len(plain.batches) > 1
    assert_same(seen.batches, plain.batches)


def tiny_of(kind):
    torch.manual_seed(0)
    return kind()


def test_a_generator_gives_the_same_ranges():
    ranges = []
    later = TensorDataset(*(tensor[8:] for tensor in dataset().tensors))  # the Trainer has fetched the first batch
    for data in (DataLoader(later, 8), generator()):
        module = tiny()
        fit(module, [Quantize(4, 4, calibration_samples=1000)], data, max_epochs=0)
        ranges.append([quantizer.log2_step.clone() for quantizer in quantizers(module)])
    assert_same(*ranges)


@pytest.mark.parametrize("data", [lambda: Plain([]), lambda: iter([]), lambda: DataLoader(Batches(), batch_size=None)])
def test_empty(data, monkeypatch):
    monkeypatch.setattr(Batches, "__iter__", lambda self: iter(()))
    with pytest.raises(DataError, match=r"Calibrating got no batches: the Trainer's training data are empty"):
        fit(tiny(), [Quantize(4, 4)], data(), max_epochs=0)


class Once(IterableDataset):
    """Keeps an iterator: what is read of it is gone."""

    def __init__(self):
        self.samples = iter(list(dataset()))

    def __iter__(self):
        return self.samples


def test_what_cannot_be_given_back_is_told():
    module = tiny()
    with (
        pytest.warns(UserWarning, match=r"not looked at with data of a Once, which can be read only once"),
        pytest.warns(UserWarning, match=r"Calibrating reads from a Once, .*: training will not see these samples"),
    ):
        fit(module, [Quantize(4, 4, calibration_samples=8)], DataLoader(Once(), 8), max_epochs=1)
    first, _, *others = [batch[0] for batch in loader()]
    assert_same(module.seen, [first, *others])  # the Trainer had fetched the first, calibration took the second


def test_a_hook_that_returns_a_generator():
    class Hooked(Tiny):
        def train_dataloader(self):
            return generator()

    module = tiny_of(Hooked)
    with pytest.warns(UserWarning, match="a generator, which can be read only once") as told:
        made = fit_without_data(module, [Quantize(4, 4, calibration_samples=8)])
    assert made.num_training_batches == float("inf")
    assert any("training will not see these samples" in str(warning.message) for warning in told)


def fit_without_data(module, callbacks):
    from tests.helpers import trainer

    made = trainer(callbacks, max_epochs=1)
    made.fit(module)
    return made


def test_borrowed_items_come_again_in_order():
    items = Returnable(iter(range(6)))
    for count in (2, 3):
        with items.borrowed() as some:
            assert [next(some) for _ in range(count)] == list(range(count))
    assert next(items) == 0
    with items.borrowed() as some:
        assert list(some) == [1, 2, 3, 4, 5]
    assert list(items) == [1, 2, 3, 4, 5]


def test_two_samples_are_enough_to_look_at():
    assert len(small_batch(loader(batch=16))[0]) == 2
    assert len(small_batch(DataLoader(Stream(endless=True), 16))[0]) == 2
    assert small_batch(DataLoader(copy.copy(dataset(0)), 16)) is None
