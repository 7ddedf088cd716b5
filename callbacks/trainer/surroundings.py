"""What is around `Quantize` in a Trainer: the strategy, and callbacks that copy or run the module before its turn."""

import lightning.pytorch as pl

from lq.callbacks.trainer.checkpoints import class_names
from lq.errors import StateError

_COPYING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
_RUNNING = {"LearningRateFinder", "BatchSizeFinder", "ModelSummary"}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise if the Trainer's strategy would split weights over devices: a part of a channel has no range."""
    if _SHARDING & class_names(trainer.strategy):
        raise StateError(
            f"Quantize does not work with {type(trainer.strategy).__name__}, which shards the weights that it rounds; "
            "use Trainer(strategy='ddp') or a single device"
        )


def put_running_last(trainer: pl.Trainer) -> None:
    """Have callbacks that run the module in ``on_fit_start`` do so after lq's callbacks have calibrated.

    Searches for a learning rate or a batch size train there, and Lightning (its Tuner too) puts them first; summaries
    run the example. The list is replaced, not changed: the Trainer is iterating over it.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    end = 1 + max((i for i, callback in enumerate(callbacks) if _is_of_lq(callback)), default=-1)
    running = [callback for callback in callbacks[:end] if _RUNNING & class_names(callback)]
    if running:
        others = [callback for callback in callbacks[:end] if callback not in running]
        trainer.callbacks = [*others, *running, *callbacks[end:]]  # type: ignore[attr-defined]


def _is_of_lq(callback: pl.Callback) -> bool:
    """Whether it is one of lq's callbacks, or a subclass."""
    return any(base.__module__.startswith("lq.callbacks.") for base in type(callback).__mro__)


def copying_callbacks(module: pl.LightningModule) -> list[str]:
    """Names of the callbacks of the module's Trainer that copy the module."""
    callbacks: list[pl.Callback] = module.trainer.callbacks if module._trainer is not None else []  # type: ignore[attr-defined]
    return [type(callback).__name__ for callback in callbacks if type(callback).__name__ in _COPYING]


def check_order(trainer: pl.Trainer, attaching: pl.Callback) -> None:
    """Raise if a callback before the one that attaches quantizers has copied the module without them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback is attaching:
            return
        if type(callback).__name__ in _COPYING:
            raise StateError(
                f"{type(callback).__name__} copies the module before Quantize has attached quantizers to it; "
                "list Quantize before it in Trainer(callbacks=[...])"
            )
