"""Batches for data-dependent stages, from the Trainer's own loader, strategy and device.

Reading them leaves no trace (`lq.callbacks.trainer.streams`): a run sees the same batches with and without the stage.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lq.attachment.sites import common_module
from lq.calibration.calibration import calibrate
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.steps import Way, called, run_forward, run_step, way_of
from lq.callbacks.trainer.streams import combined, make_returnable, mode_of, reading, small_batch
from lq.errors import DataError
from lq.structure.forward import Forward, run
from lq.structure.samples import batch_size


@runtime_checkable
class BatchSource(Protocol):
    """A callback whose batches every stage reads instead of those of the Trainer's loader."""

    def source_batches(self, trainer: pl.Trainer, samples: int) -> Iterator[Any]:
        """At least `samples` samples (over all ranks) in batches, on the device; fewer if there are fewer."""

    def example_batch(self, module: pl.LightningModule) -> Any:
        """A small batch to look at the module with, on the CPU, before there are others."""


class TrainingBatches(Iterator[Any]):
    """Batches, and about how many are left.

    Args:
        source: the batches.
        expected: gets their number when the first has come.
    """

    def __init__(self, source: Generator[Any], expected: list[int]) -> None:
        self._source, self._expected = source, expected  # no more: the source must end when nobody has this any longer
        self._ahead: list[Any] = []
        self._taken = 0

    def __next__(self) -> Any:
        batch = self._ahead.pop() if self._ahead else next(self._source)
        self._taken += 1
        return batch

    def __length_hint__(self) -> int:
        return max(self._expected[0] - self._taken, 0) if self._expected else 0

    def peek(self) -> Any:
        """The first of what comes; None: nothing does."""
        self._ahead = list(itertools.islice(self._source, 1))
        return self._ahead[0] if self._ahead else None


def training_batches(trainer: pl.Trainer, samples: int, title: str) -> TrainingBatches:
    """At least `samples` training samples (over all ranks) in batches, on the device; fewer if the loader ends.

    The Trainer's ``limit_train_batches``, ``overfit_batches`` and ``fast_dev_run`` hold here too. A `BatchSource` among
    its callbacks is read instead of its loader.

    Args:
        trainer: a trainer that is fitting.
        samples: number of samples over all ranks.
        title: of what reads them, for messages.
    """
    expected: list[int] = []
    return TrainingBatches(_read(trainer, samples, title, expected), expected)


def _read(trainer: pl.Trainer, samples: int, title: str, expected: list[int]) -> Generator[Any]:
    """The batches; `expected` gets their number when the first has come."""
    producer = _batch_source(trainer)
    if producer is not None:
        yield from producer.source_batches(trainer, samples)
        return
    make_returnable(trainer.fit_loop)
    trainer.fit_loop.setup_data()
    source = trainer.train_dataloader
    if source is None:
        raise DataError(
            f"{title} got no batches: the Trainer has no training data; pass a train dataloader to fit, and leave "
            "limit_train_batches above 0"
        )
    loader = CombinedLoader(source, mode_of(getattr(trainer.fit_loop, "_combined_loader", None)))
    module = trainer.lightning_module
    share, seen, read = math.ceil(samples / trainer.world_size), 0, 0
    with isolate_rng(), reading(loader, title):
        limit = None if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
        for loaded, _, index in itertools.islice(iter(loader), limit):
            if not read:
                whole = -(-share // max(batch_size(loaded), 1))
                expected.append(whole if limit is None else min(whole, limit))
            converted = trainer.precision_plugin.convert_input(loaded)
            batch = module._on_before_batch_transfer(converted, dataloader_idx=index)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)
            read += 1
            seen += batch_size(loaded)
            if seen >= share:
                break
    if not read:
        raise DataError(
            f"{title} got no batches: the Trainer's training data are empty; pass a train dataloader that gives at "
            "least one batch"
        )


def first_batch(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """A small batch from the data of the stage that is being set up, on the CPU; None if there is none to read.

    Before the loaders are set up, and without a trace: nothing is drawn from a sampler, and random states are restored.
    """
    producer = _batch_source(trainer)
    if producer is not None:
        return producer.example_batch(module)
    loop: Any = trainer.fit_loop if trainer.state.fn == "fit" else trainer._active_loop
    defined = getattr(loop, "_data_source", None)
    if defined is None or not defined.is_defined():
        return None
    make_returnable(loop)
    with isolate_rng():
        source = defined.dataloader()
        default: Any = "max_size_cycle" if trainer.state.fn == "fit" else "sequential"
        loader = source if isinstance(source, CombinedLoader) else CombinedLoader(source, default)
        parts = [small_batch(part) for part in loader.flattened]
        if not parts or any(part is None for part in parts):
            return None
        return module._apply_batch_transfer_handler(combined(parts, loader), device=torch.device("cpu"))


def forward_of(
    trainer: pl.Trainer, module: pl.LightningModule, forward: Forward | None, *, autocast: bool = True
) -> Forward:
    """How to run a batch through `module`, at the Trainer's precision or without its autocast.

    In this order: `forward`; the module's own ``calibration_step(batch)``; its ``forward``, if it takes the batch, its
    first part or, of a dict, the parts of its parameters' names (`lq.structure.forward`); the same of the part that
    holds all quantized layers, for modules without a ``forward``; its ``training_step``, listened to
    (`lq.callbacks.trainer.steps`).

    Raises:
        DataError: if all of them were tried on a batch of the Trainer's data and failed.
    """
    if forward is None and not callable(getattr(module, "calibration_step", None)):
        way = way_of(module, lambda: first_batch(trainer, module))
    else:
        way = Way()

    def call(model: nn.Module, batch: Any) -> Any:
        with trainer.precision_plugin.forward_context() if autocast else nullcontext():
            if forward is not None:
                return run(model, batch, forward)
            own = getattr(model, "calibration_step", None)
            if callable(own):
                return called("calibration_step", model, batch, lambda _, batch: own(batch))
            return run_step(model, batch, trainer, way.teachers) if way.by_step else run_forward(model, batch)

    return call


def run_example(module: nn.Module, example: Any) -> Any:
    """Run a module on its ``example_input_array``, as Lightning does."""
    if type(module).forward is pl.LightningModule.forward:
        module = common_module(module)[1]
    if isinstance(example, Mapping):
        return module(**example)
    return module(*example) if isinstance(example, tuple) else module(example)


def calibrate_on_training_data(
    trainer: pl.Trainer, module: pl.LightningModule, samples: int, forward: Forward | None
) -> None:
    """Find the ranges of all quantizers on training samples, on all ranks together, for averages of the module too."""
    with progress_of(trainer):
        calibrate(
            module,
            training_batches(trainer, samples, "Calibrating"),
            forward=forward_of(trainer, module, forward),
            reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
        )
    give_to_averages(trainer, module)


def reduce_over(trainer: pl.Trainer) -> Callable[[Tensor, str], Tensor]:
    """The Trainer's reduction over ranks, by the name of the operation: "sum", "min" or "max"."""
    return lambda tensor, operation: trainer.strategy.reduce(tensor, reduce_op=operation)


def _batch_source(trainer: pl.Trainer) -> BatchSource | None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, BatchSource)), None)
