"""Activation checkpointing, switched off for a while: what is measured or captured in a forward happens once.

Checkpointing (`torch.utils.checkpoint`) runs parts of a forward a second time in backward, where hooks and quantizers
would be met again. Two things are done about it, for the time of a context and in its thread alone:

- attributes by which modules choose it (timm's ``grad_checkpointing``, Hugging Face's ``gradient_checkpointing``) are
  False, so that the model calls the same modules as one that never had it;
- the two ways in which torch itself recomputes, whoever calls them and however they were imported, run plainly.

Implementations of other libraries cannot be reached. `recomputed` is the error for them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.utils.checkpoint
from torch import nn

from lq.errors import StateError

#: Attributes, True or False, by which modules choose to recompute in backward.
_CHOICES = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "use_checkpointing")


class _Switch(threading.local):
    """Whether this thread runs checkpointed functions plainly."""

    plain = 0


_SWITCH = _Switch()


@contextmanager
def without_recomputation(*models: nn.Module) -> Iterator[None]:
    """Run what is checkpointed as if it were not, in this thread; `models` are those that will run.

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
    _SWITCHES.open()
    _SWITCH.plain += 1
    try:
        for module, name in chosen:
            module.__dict__[name] = False
        yield
    finally:
        for module, name in chosen:
            module.__dict__[name] = True
        _SWITCH.plain -= 1
        _SWITCHES.close()


def recomputed(what: str) -> StateError:
    """The error where a part of the model runs again in backward all the same."""
    return StateError(
        f"{what} ran again in backward: the model recomputes its activations (checkpointing) by code that is not "
        "torch.utils.checkpoint; turn that off while lq measures or reconstructs"
    )


class _Switches:
    """Switches in torch.utils.checkpoint, there while a context is open in any thread; other threads run as before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts = 0
        self._apply: Any = None  # reentrant
        self._hook: Any = None  # not reentrant: packs what is saved for backward

    def open(self) -> None:
        """Put them in, with the first context."""
        module: Any = torch.utils.checkpoint
        with self._lock:
            self._contexts += 1
            if self._contexts > 1:
                return
            function = getattr(module, "CheckpointFunction", None)
            if function is not None:
                self._apply = function.__dict__.get("apply")
                function.apply = staticmethod(_switched_apply(function.apply))
            self._hook = getattr(module, "_checkpoint_hook", None)
            if self._hook is not None:
                module._checkpoint_hook = _switched_hook(self._hook)

    def close(self) -> None:
        """Take them out, with the last context."""
        module: Any = torch.utils.checkpoint
        with self._lock:
            self._contexts -= 1
            if self._contexts:
                return
            function = getattr(module, "CheckpointFunction", None)
            if function is not None and self._apply is not None:
                function.apply = self._apply
            elif function is not None:
                del function.apply  # it is inherited
            if self._hook is not None:
                module._checkpoint_hook = self._hook


_SWITCHES = _Switches()


def _switched_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(run_function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return run_function(*args) if _SWITCH.plain else original(run_function, preserve_rng_state, *args)

    return apply


def _switched_hook(original: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
    def hook(frame: Any) -> AbstractContextManager[Any]:
        return nullcontext() if _SWITCH.plain else original(frame)

    return hook
