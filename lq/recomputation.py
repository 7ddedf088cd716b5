"""Activation checkpointing (``torch.utils.checkpoint``): what lq does around it.

In backward, checkpointing runs a part of a forward again, outside of the module that it belongs to. Two things follow:

- what lq knows while a module's forward runs must be there again: `carried_into_recomputation` takes it along;
- measuring, which sees tensors as they are computed, must see each once: `without_recomputation` has checkpointed
  functions run as if they were not, in this thread.

torch has no hook for either, so its two ways in are wrapped, once; they do what they did wherever lq is not at work.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.utils.checkpoint

#: Wraps a function that is about to run, and may run again in backward; returns it as it is if there is nothing to do.
#: Told whether the first run of what it returns is a recomputation already.
Carrier = Callable[[Callable[..., Any], bool], Callable[..., Any]]

# Where the variant that is not reentrant takes the function to run again; by torch's version.
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")

_carriers: list[Carrier] = []


class _State(threading.local):
    plain = 0


_STATE = _State()


def carried_into_recomputation(carrier: Carrier) -> Carrier:
    """Have `carrier` wrap every function that is checkpointed from now on; use as a decorator."""
    _carriers.append(carrier)
    return carrier


@contextmanager
def without_recomputation() -> Iterator[None]:
    """Run checkpointed functions plainly in this thread: nothing is computed again in backward."""
    _STATE.plain += 1
    try:
        yield
    finally:
        _STATE.plain -= 1


def _carried(function: Callable[..., Any], recomputes: bool) -> Callable[..., Any]:
    for carrier in _carriers:
        function = carrier(function, recomputes)
    return function


def _wrap_checkpointing() -> None:
    kind: Any = torch.utils.checkpoint.CheckpointFunction
    apply = kind.apply

    @wraps(apply)
    def plain_or_checkpointed(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if _STATE.plain:
            return function(*args)
        return apply(_carried(function, False), preserve_rng_state, *args)

    kind.apply = plain_or_checkpointed
    name = next((name for name in _GENERATORS if hasattr(torch.utils.checkpoint, name)), None)
    if name is None:
        return
    generator = getattr(torch.utils.checkpoint, name)

    @wraps(generator)
    def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _STATE.plain:
            return iter((None,))  # what torch's own does before and after the forward: nothing
        return generator(_carried(function, True), *args, **kwargs)

    setattr(torch.utils.checkpoint, name, around)


_wrap_checkpointing()
