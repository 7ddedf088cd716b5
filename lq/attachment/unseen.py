"""Layers that a dry run did not reach: which of them belong to the network, and what is said of the others.

A dry run takes one path. Experts that no sample was sent to, early exits, branches taken by chance and heads that run
in training only lie beside it, and are told by their class like the layers of a model that was not looked at. Other
modules are held but never part of the network: a teacher, an average of the weights, the other half of a GAN, a network
that a loss is measured by. The rule: what lies in a module that ran belongs to it. Directly below the model itself,
layers of its own and parts of which something ran do; a part of which nothing ran is left in float. Should a layer that
was left run after all, a warning says so, once.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lq.attachment.sites import float_weight, layers
from lq.errors import NoEffectWarning
from lq.structure.structure import NOT_USED, Structure

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_PARAMETRIZED = ".parametrizations.weight.original"


def unseen_layers(
    model: nn.Module, structure: Structure, kinds: tuple[type[nn.Module], ...]
) -> tuple[list[str], list[str]]:
    """Layers of these kinds that the dry run did not reach: those of the network, and those of other parts.

    Args:
        model: the model, with or without quantizers.
        structure: what the dry run saw; of one that does not know which modules ran, nothing follows.
        kinds: classes of layers whose weight is quantized without being named.
    """
    ran = set(structure.ran)
    if not ran:
        return [], []
    first_names = {id(p): name.replace(_PARAMETRIZED, ".weight").lstrip(".") for name, p in model.named_parameters()}
    unused = {tensor.name for tensor in structure.floats if tensor.reason == NOT_USED}
    with_sites = {site.module for site in structure.sites if site.place == "weight"}
    modules = dict(model.named_modules())
    inside: list[str] = []
    outside: list[str] = []
    for name, layer in layers(model):
        weight = first_names.get(id(float_weight(layer)))
        if isinstance(layer, kinds) and name not in ran | with_sites and weight in unused:
            (inside if _belongs(name, modules, ran) else outside).append(name)
    return inside, outside


def _belongs(name: str, modules: Mapping[str, nn.Module], ran: Collection[str]) -> bool:
    """Whether a layer that did not run lies in the network that did."""
    parts = name.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    if any(path in ran or (_ran_below(path, ran) and type(modules.get(path)) is not nn.ModuleDict) for path in above):
        return True  # in a dict, as at the top, parts are told apart: {"student": ..., "teacher": ...}
    return "" in ran and all(type(modules.get(path)) in _CONTAINERS for path in above)


def _ran_below(path: str, ran: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in ran)


class _LeftInFloat:
    """Forward pre-hook, one for all layers that were left in float because the dry run did not come near them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.said = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.said or torch.compiler.is_compiling():
            return
        self.said = True
        few = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        warnings.warn(
            f"a {type(module).__name__} runs in float: it is in a part of the model that the dry run did not enter, so "
            f"that these layers have no quantizers: {few}. Name them in overrides= to quantize them (or look at the "
            "model with an example that goes there), or in exclude= if they are to stay as they are, as a teacher is",
            NoEffectWarning,
            stacklevel=2,
        )


def watch_left(model: nn.Module, names: Sequence[str]) -> None:
    """Have layers that were left in float say so should they run."""
    hook = _LeftInFloat(names)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook)


def forget_left(module: nn.Module) -> None:
    """Undo `watch_left` on a module."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _LeftInFloat)]:
        del hooks[key]
