"""Activation checkpointing (``torch.utils.checkpoint``): what lq does around it.

In backward, checkpointing runs a part of a forward again, outside of the module that it belongs to. Two things follow:

- what lq knows while a module's forward runs must be there again: `carried_into_recomputation` takes it along;
- measuring, which sees tensors as they are computed, must see each once: `without_recomputation` has checkpointed
  functions run as if they were not, in this thread.

torch has no hook for either, so its ways in are wrapped, once; they do what they did wherever lq is not at work.
Implementations of other libraries cannot be reached. `recomputed` is the error for them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch.utils.checkpoint
from torch import nn

from lq.errors import StateError

#: Wraps a function that is about to run, and may run again in backward; returns it as it is if there is nothing to do.
#: Told whether the first run of what it returns is a recomputation already.
Carrier = Callable[[Callable[..., Any], bool], Callable[..., Any]]

# Where the variant that is not reentrant takes the function to run again; by torch's version.
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
# Attributes, True or False, by which modules of timm, Hugging Face and others choose to recompute in backward.
_CHOICES = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "use_checkpointing")

_carriers: list[Carrier] = []


class _State(threading.local):
    plain = 0


_STATE = _State()


def carried_into_recomputation(carrier: Carrier) -> Carrier:
    """Have `carrier` wrap every function that is checkpointed from now on; use as a decorator."""
    _carriers.append(carrier)
    return carrier


@contextmanager
def without_recomputation(*models: nn.Module) -> Iterator[None]:
    """Run what is checkpointed as if it were not, in this thread; `models` are those that will run.

    Attributes by which they choose to checkpoint are False meanwhile: they call the modules that they call without.

    >>> layer = nn.Linear(2, 2)
    >>> calls = []
    >>> handle = layer.register_forward_hook(lambda *_: calls.append(1))
    >>> with without_recomputation(layer):
    ...     y = torch.utils.checkpoint.checkpoint(layer, torch.ones(1, 2), use_reentrant=False)
    ...     y.sum().backward()
    >>> len(calls)
    1
    """
    chosen = [
        (module, name)
        for module in dict.fromkeys(part for model in models for part in model.modules())
        for name in _CHOICES
        if module.__dict__.get(name) is True
    ]
    _STATE.plain += 1
    try:
        for module, name in chosen:
            module.__dict__[name] = False
        yield
    finally:
        for module, name in chosen:
            module.__dict__[name] = True
        _STATE.plain -= 1


def recomputed(what: str) -> StateError:
    """The error where a part of the model runs again in backward all the same."""
    return StateError(
        f"{what} ran again in backward: the model recomputes its activations (checkpointing) by code that is not "
        "torch.utils.checkpoint; turn that off while lq measures or reconstructs"
    )


def _carried(function: Callable[..., Any], recomputes: bool) -> Callable[..., Any]:
    for carrier in _carriers:
        function = carrier(function, recomputes)
    return function


def _wrap_checkpointing() -> None:
    module: Any = torch.utils.checkpoint
    apply = module.CheckpointFunction.apply  # reentrant

    @wraps(apply)
    def plain_or_checkpointed(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _STATE.plain:
            return function(*args)
        return apply(_carried(function, False), preserve_rng_state, *args)

    module.CheckpointFunction.apply = plain_or_checkpointed
    name = next((name for name in _GENERATORS if hasattr(module, name)), None)
    if name is not None:
        setattr(module, name, _carrying(getattr(module, name)))
    hook = getattr(module, "_checkpoint_hook", None)  # not reentrant: packs what is saved for backward
    if hook is not None:
        module._checkpoint_hook = _switched(hook)


def _carrying(generator: Callable[..., Any]) -> Callable[..., Any]:
    """What runs before and after a forward that is checkpointed."""

    @wraps(generator)
    def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(function if _STATE.plain else _carried(function, True), *args, **kwargs)

    return around


def _switched(hook: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
    @wraps(hook)
    def switched(frame: Any) -> AbstractContextManager[Any]:
        return nullcontext() if _STATE.plain else hook(frame)

    return switched


_wrap_checkpointing()
