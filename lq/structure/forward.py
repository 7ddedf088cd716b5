"""Run a model on a batch: the forward that a caller gives, or the one that the batch and the model's signature tell.

A tensor, or a packed sequence, is the model's argument; of a tuple or list, the first part is. Parts that have names
(the keys of a mapping, the fields of a dataclass or of a named tuple) are matched with the parameters of the model's
``forward``: those of one name go together, as Hugging Face's models and data sets of dicts want it; a ``forward`` with
one argument of another name gets the mapping as a whole. What none of this tells is an error that names ``forward=``;
nothing is guessed.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

from lq.errors import DataError

#: Runs the model on a batch; what it returns is ignored.
Forward = Callable[[Any, Any], Any]

#: What a model's own code raises if it cannot take what it is given.
FAILURES = (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, KeyError, IndexError)

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run `model` on a batch, by `forward` or as the batch and the model's signature tell.

    Raises:
        DataError: if they do not tell how, or the model fails on the batch.
    """
    try:
        if forward is not None:
            return forward(model, batch)
        args, kwargs = arguments(model, batch)
        return model(*args, **kwargs)
    except DataError:
        raise
    except FAILURES as error:
        raise DataError(_failure(model, batch, forward, error)) from error


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the default forward calls `model` with for a batch, on the model's device.

    Raises:
        TypeError: if batch and signature do not tell.

    >>> import torch
    >>> arguments(nn.Linear(2, 1), (torch.zeros(3, 2), "label"))[0][0].shape
    torch.Size([3, 2])
    >>> arguments(nn.Bilinear(2, 2, 1), {"input2": 1, "input1": 0, "label": 2})
    ((), {'input1': 0, 'input2': 1})
    """
    args, kwargs = _chosen(model, batch)
    reference = next(model.parameters(), None)
    if reference is None:
        return args, kwargs
    device = reference.device
    moved: tuple[tuple[Any, ...], dict[str, Any]] = _pytree.tree_map(
        lambda part: _on(device, part),
        (args, kwargs),
        is_leaf=lambda part: isinstance(part, PackedSequence),  # it moves its own parts: some stay on the CPU
    )
    return moved


def _on(device: torch.device, part: Any) -> Any:
    moved: Any = part  # torch declares no device for packed sequences
    return moved.to(device) if isinstance(part, (Tensor, PackedSequence)) else part


def _chosen(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, (Tensor, PackedSequence)):
        return (batch,), {}
    named = named_parts(batch)
    if named is not None:
        by_name = _by_name(model, named)
        if by_name is not None:
            return (), by_name
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        if isinstance(first, (list, tuple)) and named_parts(first) is None:
            return _several(model, first), {}
        if isinstance(first, Tensor) or named_parts(first) is not None:
            return _chosen(model, first)
    elif named is not None and len(_required(model)) == 1:
        return (batch,), {}
    raise TypeError(
        "the default forward takes a tensor, a tuple or list that starts with what the model takes, or a mapping (or "
        f"dataclass) with the arguments of {_shown(model)} by name"
    )


def _several(model: nn.Module, parts: Any) -> tuple[Any, ...]:
    """A list of tensors: the model's one argument, or its arguments if it has as many."""
    required = len(_required(model))
    if required == len(parts) > 1:
        return tuple(parts)
    if required <= 1:
        return (parts,)
    raise TypeError(f"{_shown(model)} has {required} arguments, the first part of the batch has {len(parts)}")


def _by_name(model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parts that the model's signature names; None if it names none, or asks for others."""
    parameters = _parameters(model)
    names = [p.name for p in parameters if p.kind in _BY_NAME and p.name in parts]
    if names and set(_required(model)) <= set(names):
        return {name: parts[name] for name in names}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if takes_any and not any(p.kind in (*_BY_POSITION, *_BY_NAME) for p in parameters):
        return dict(parts)
    return None


def named_parts(batch: Any) -> Mapping[str, Any] | None:
    """The parts of a batch by name; None if they have none."""
    if isinstance(batch, Mapping):
        return batch if all(isinstance(key, str) for key in batch) else {}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fields = getattr(batch, "_fields", None)
    if isinstance(batch, tuple) and isinstance(fields, tuple):
        return dict(zip(fields, batch, strict=True))
    return None


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters of the model's forward; of a compiled model, those of the one it was made of."""
    wrapped = model._modules.get("_orig_mod")
    try:
        return list(inspect.signature((wrapped or model).forward).parameters.values())
    except (TypeError, ValueError):  # no Python function, as in scripted modules: one argument
        return [inspect.Parameter("input", inspect.Parameter.POSITIONAL_ONLY)]


def _required(model: nn.Module) -> list[str]:
    """Names of the parameters that a call has to give."""
    kinds = (*_BY_POSITION, *_BY_NAME)
    return [p.name for p in _parameters(model) if p.kind in kinds and p.default is inspect.Parameter.empty]


def _shown(model: nn.Module) -> str:
    """The signature of the model's forward, without types."""
    parts = [p.replace(annotation=inspect.Parameter.empty) for p in _parameters(model)]
    return f"{type(model).__name__}.forward({', '.join(map(str, parts))})"


def _failure(model: nn.Module, batch: Any, forward: Forward | None, error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "")  # the rest of it is in the traceback
    if type(error) not in (TypeError, RuntimeError, ValueError):
        said = f"{type(error).__name__}: {said}"
    if forward is not None:
        return f"forward= failed on {type(model).__name__} and a batch of {describe(batch)}: {said}"
    return (
        f"{type(model).__name__} did not take a batch of {describe(batch)}: {said}; "
        "pass forward=, a callable that is given the model and the batch and runs the one on the other"
    )


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch."""
    named = named_parts(batch) or (batch if isinstance(batch, Mapping) else None)
    if isinstance(batch, Tensor):
        yield batch
    elif named is not None or isinstance(batch, (tuple, list)):
        for part in batch if named is None else named.values():
            yield from tensors_of(part)


def describe(batch: Any) -> str:
    """The shape of a batch in words.

    >>> import torch
    >>> describe([torch.zeros(2, 3), {"y": 1}])
    'list(Tensor(2, 3), dict(y: int))'
    """
    if isinstance(batch, Tensor):
        return f"Tensor{tuple(batch.shape)}"
    named = named_parts(batch) or (batch if isinstance(batch, Mapping) else None)
    if named is not None:
        return f"{type(batch).__name__}({', '.join(f'{key}: {describe(value)}' for key, value in named.items())})"
    if isinstance(batch, (tuple, list)):
        shown = [describe(part) for part in batch[:8]] + ([f"and {len(batch) - 8} more"] if len(batch) > 8 else [])
        return f"{type(batch).__name__}({', '.join(shown)})"
    return type(batch).__name__


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
