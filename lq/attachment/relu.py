"""ReLUs in the place of GELUs, and how they are known again in what is saved: two that look alike compute otherwise.

A GELU has no tensors, so that nothing in a state dict would tell it from a ReLU. `ReLUForGELU` has one, named for what
it says, without which nothing loads into it and which loads into nothing else.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import DataError

#: Name of that tensor in a state dict, behind the name of the activation function.
MARK = "relu_in_place_of_gelu"

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


class ReLUForGELU(nn.ReLU):
    """A ReLU where the model is built with a GELU, and the layers around it are fitted to that."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(MARK, torch.ones((), dtype=torch.uint8))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + MARK in missing:  # an error, if loading is strict
            missing[missing.index(prefix + MARK)] = f"{prefix + MARK}: {_other(prefix.rstrip('.'))}"


def put_relu(model: nn.Module, name: str) -> None:
    """Put a ReLU in the place of the activation function of that name; the mode stays."""
    path, _, last = name.rpartition(".")
    before, relu = model.get_submodule(name), ReLUForGELU()
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    for hooks in _HOOKS:  # of modules around it, which count what runs inside of them
        getattr(relu, hooks).update(getattr(before, hooks))
    model.get_submodule(path)._modules[last] = relu.to(device).train(before.training)


def relus_in(model: nn.Module) -> list[str]:
    """Names of the ReLUs that are in the place of GELUs."""
    return [name for name, module in model.named_modules() if isinstance(module, ReLUForGELU)]


def marked(keys: Iterable[str]) -> list[str]:
    """Names of the activation functions that are ReLUs in a state dict."""
    return [key.removesuffix(f".{MARK}") for key in keys if key.endswith(f".{MARK}")]


def put_relus_of(model: nn.Module, state_dict: Mapping[str, Tensor | Any], prefix: str = "") -> None:
    """Put ReLUs where a state dict has them.

    Args:
        model: the model.
        state_dict: tensors by key.
        prefix: of the keys of this model in it.

    Raises:
        DataError: if the model has no activation function of such a name, or a ReLU where the state dict has a GELU.
    """
    theirs = [name.removeprefix(prefix) for name in marked(state_dict) if name.startswith(prefix)]
    modules = dict(model.named_modules())
    for name in theirs:
        if name not in modules or list(modules[name].parameters()) or list(modules[name].children()):
            raise DataError(
                f"the checkpoint has a ReLU in place of a GELU at {name!r}, where {type(model).__name__} has no "
                "activation function; build the model the checkpoint was saved from"
            )
    for name in relus_in(model):
        if name not in theirs:
            raise DataError(_other(name))
    for name in theirs:
        if not isinstance(modules[name], ReLUForGELU):
            put_relu(model, name)


def _other(name: str) -> str:
    return (
        f"the checkpoint has a GELU at {name!r}, where the model has a ReLU since ReconstructMLP: build the model anew "
        "and load the checkpoint into that, before ReconstructMLP"
    )
