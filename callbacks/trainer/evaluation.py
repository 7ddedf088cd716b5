"""Accuracy on the Trainer's own validation data, read without a trace: for batches that have classes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lq.bars import steps
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.streams import make_returnable, mode_of, reading
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward, eval_mode, named_parts, tensors_of

_LABELS = ("labels", "label", "targets", "target", "classes", "y")


def validation_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """The batches of the validation data on this rank, on the device; none if the Trainer has none."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.limit_val_batches or not loop._data_source.is_defined():
        return
    make_returnable(loop)
    module = trainer.lightning_module
    with isolate_rng():
        loop.setup_data()
        if loop._combined_loader is None:
            return
        loader = CombinedLoader(loop._combined_loader.iterables, mode_of(loop._combined_loader))
        limits = [int(most) if most != float("inf") else None for most in loop.max_batches]
        with reading(loader, "Measuring accuracy"):
            for loaded, index, number in iter(loader):
                most = limits[number] if number < len(limits) else None
                if loaded is None or (most is not None and index >= most):
                    continue
                converted = trainer.precision_plugin.convert_input(loaded)
                batch = module._on_before_batch_transfer(converted, dataloader_idx=number)
                yield trainer.strategy.batch_to_device(batch, dataloader_idx=number)


def accuracy_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    samples: int,
    forward: Callable[[], Forward],
    reduce: Reduce | None = None,
) -> tuple[float, int] | None:
    """Share of samples whose class has the highest score, and how many there were; None: nothing to measure on.

    Args:
        trainer: whose validation data are read.
        module: in eval mode meanwhile, quantized as it is.
        samples: about how many, over all ranks.
        forward: makes what runs the module on a batch; asked if there is a batch with classes.
        reduce: combines a tensor over ranks.
    """
    right, seen, run = 0, 0, None
    share = -(-samples // trainer.world_size)
    batches = validation_batches(trainer)
    try:
        with eval_mode(module), torch.no_grad(), progress_of(trainer):
            for batch in steps(batches, "Measuring accuracy"):
                classes = classes_in(batch)
                if classes is None:
                    break
                run = forward() if run is None else run
                scores = next((t for t in tensors_of(run(module, batch)) if t.ndim == 2), None)
                if scores is None or len(scores) != len(classes) or scores.shape[1] <= int(classes.max()):
                    break
                right += int((scores.argmax(1) == classes).sum())
                seen += len(classes)
                if seen >= share:
                    break
    finally:
        batches.close()  # type: ignore[attr-defined]
    if reduce is not None:
        counts = reduce(torch.tensor([float(right), float(seen)], device=module.device), "sum")
        right, seen = (round(float(count)) for count in counts)
    return (right / seen, seen) if seen else None


def classes_in(batch: Any) -> Tensor | None:
    """The class of each sample: the second part of a pair, or what has such a name; None: there are none."""
    named = named_parts(batch)
    if isinstance(batch, Mapping) or named is not None:
        found = next((part for key, part in (named or {}).items() if key in _LABELS), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(found, Tensor) and found.ndim == 1 and found.numel() and not found.is_floating_point():
        return found if int(found.min()) >= 0 else None
    return None
