"""Run a LightningModule on a batch as its own code does: its forward where that fits, else its ``training_step``.

A ``training_step`` knows what of a batch goes where. It runs with all modules in eval mode, without gradients and
without a trace (nothing is logged, metrics end as they were), and what it calls is listened to: the output is that of
the last module with weights that it calls itself. Steps that optimize by hand are not run.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lq.attachment.sites import activation_quantizers, common_module
from lq.errors import DataError
from lq.structure.forward import FAILURES, describe, eval_mode, run


@dataclass(frozen=True)
class Way:
    """How a module is run on a batch.

    Args:
        by_step: by its ``training_step``, instead of by its forward or that of the part of it that is the network.
        teachers: children that the step may call too, and that are not trained: no parameter of theirs is.
    """

    by_step: bool = False
    teachers: frozenset[str] = frozenset()


_HINT = "give the module a calibration_step(batch), or pass forward=, called with the module and the batch"
_WAYS: "WeakKeyDictionary[nn.Module, Way]" = WeakKeyDictionary()


def way_of(module: pl.LightningModule, first_batch: Callable[[], Any]) -> Way:
    """How to run the module: found once, by trying on a small batch.

    Raises:
        DataError: if neither its forward nor its ``training_step`` takes the batch.
    """
    if module not in _WAYS:
        _WAYS[module] = _find_way(module, first_batch)
    return _WAYS[module]


def teachers_of(module: pl.LightningModule) -> Collection[str]:
    """Children that the way that was found runs besides the network."""
    return _WAYS.get(module, Way()).teachers


def _find_way(module: pl.LightningModule, first_batch: Callable[[], Any]) -> Way:
    if not is_overridden("training_step", module) or not module.automatic_optimization:
        return Way()
    batch = first_batch()
    if batch is None:
        return Way()
    trained = {name for name, child in module.named_children() if any(p.requires_grad for p in child.parameters())}
    held = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    by_step = Way(True, frozenset(held - trained if trained else ()))
    with ExitStack() as stack:
        stack.enter_context(eval_mode(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(isolate_rng())
        for quantizer in activation_quantizers(module).values():  # calibrated or not, and without counting
            stack.callback(setattr, quantizer, "tap", quantizer.tap)
            quantizer.tap = _pass
        try:
            run_forward(module, batch)
            return Way()
        except DataError as error:
            failed = error
        try:
            run_step(module, batch, teachers=by_step.teachers)
            return by_step
        except DataError as error:
            raise DataError(f"{failed}. Its training_step was tried too, without success: {error}") from error


def run_forward(model: nn.Module, batch: Any) -> Any:
    """Run the module's forward; of a module without one, that of the part that holds all (quantized) layers."""
    own = type(model).forward is not pl.LightningModule.forward
    return run(model if own else common_module(model)[1], batch)


def run_step(model: nn.Module, batch: Any, trainer: pl.Trainer | None = None, teachers: Collection[str] = ()) -> Any:
    """Run ``training_step`` and return the output of the last module with weights that it calls itself, no teacher's.

    Raises:
        DataError: if it fails, or calls none.
    """
    outputs: list[Any] = []
    depth = 0

    def entered(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def left(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth and module not in others and any(p.ndim > 1 for p in module.parameters()):
            outputs.append(output)

    others = {part for name in teachers for part in model.get_submodule(name).modules()}

    with ExitStack() as stack:
        stack.enter_context(quiet(model, trainer))
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(entered, prepend=True).remove)
                stack.callback(module.register_forward_hook(left, always_call=True).remove)
        called("training_step", model, batch, call_step)
    if not outputs:
        raise DataError(f"the training_step of {type(model).__name__} calls no module with weights; {_HINT}")
    return outputs[-1]


def call_step(model: Any, batch: Any) -> Any:
    """Call ``training_step`` on a batch, with the arguments that it takes."""
    parameters = inspect.signature(model.training_step).parameters
    if "dataloader_iter" in parameters:
        raise TypeError("it takes dataloader_iter=, not batches")
    batch = move_data_to_device(batch, model.device)
    return model.training_step(batch, 0) if len(parameters) > 1 else model.training_step(batch)


def called(name: str, model: nn.Module, batch: Any, function: Callable[[nn.Module, Any], Any]) -> Any:
    """What `function`, the module's method `name`, makes of a batch.

    Raises:
        DataError: with the error in the user's code, if it fails.
    """
    try:
        return function(model, batch)
    except DataError:
        raise
    except FAILURES as error:
        raise DataError(
            f"the {name} of {type(model).__name__} failed on a batch of {describe(batch)}: "
            f"{type(error).__name__}: {error}; {_HINT}"
        ) from error


@contextmanager
def quiet(model: nn.Module, trainer: pl.Trainer | None = None) -> Iterator[None]:
    """Ignore what ``training_step`` logs (there is no loop to log to yet), and have its metrics end as they were."""
    metrics = [(m, copy.deepcopy(m).__getstate__()) for m in model.modules() if _is_metric(m)]
    detached = isinstance(model, pl.LightningModule) and model._trainer is None and trainer is not None
    if detached:  # a copy of the module, such as the float one
        model.trainer = trainer  # type: ignore[assignment]
    for name in ("log", "log_dict"):
        setattr(model, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            delattr(model, name)
        if detached:
            model.trainer = None  # type: ignore[assignment]
        for metric, state in metrics:
            metric.__setstate__(state)


def _is_metric(module: nn.Module) -> bool:
    """Whether it is one of torchmetrics, which count what they are called with."""
    return any(c.__name__ == "Metric" and c.__module__.startswith("torchmetrics") for c in type(module).__mro__)


def _pass(x: Any) -> Any:
    return x
