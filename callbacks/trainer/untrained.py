"""Quantized weights that no optimizer trains: optimizers are built as for the float module, and others are looked at.

A quantized layer computes its ``weight``, so that code which collects parameters by name, by attribute or by
``isinstance`` may miss the Parameter behind it. ``configure_optimizers`` sees the module as it was
(`lq.attachment.float_view`). What is built or extended elsewhere is looked at before the first step.
"""

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from lq.attachment.float_view import as_float, float_parameter
from lq.attachment.sites import weight_quantizer
from lq.quantizer.quantizer import Quantizer

_ADVICE = (
    "A quantized layer computes its weight; the Parameter is layer.parametrizations.weight.original. Build optimizers "
    "in configure_optimizers, where names and attributes are those of the float module, or collect "
    "[p for name, p in module.named_parameters() if name.endswith(('weight', 'weight.original'))]"
)


def build_as_float(module: pl.LightningModule) -> None:
    """Have the next ``configure_optimizers`` of a module see it as it was before it was quantized."""
    configure = module.configure_optimizers
    if getattr(configure, "sees_float", False):
        return
    replaced = "configure_optimizers" in vars(module)

    @functools.wraps(configure)
    def configure_optimizers() -> Any:
        if replaced:
            module.configure_optimizers = configure  # type: ignore[method-assign]
        else:
            del module.__dict__["configure_optimizers"]
        with as_float(module):
            return configure()

    configure_optimizers.sees_float = True  # type: ignore[attr-defined]
    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]


class UntrainedWeights:
    """Looks at the optimizers once, before the first step of a training, for weights that none of them holds.

    By then all callbacks have had their turn in ``on_train_start``, where some give optimizers what they train.
    """

    def __init__(self) -> None:
        self._expected = False

    def expect(self) -> None:
        """Have the next `look` do so."""
        self._expected = True

    def look(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Warn of quantized weights that no optimizer holds, if a training has begun since the last look."""
        if self._expected:
            self._expected = False
            warn_of_untrained(module, optimizers)


def warn_of_untrained(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Warn of quantized weights that no optimizer holds, if it looks as if one should."""
    tensors = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    computed = computed_weights(module, tensors)
    if computed:
        warnings.warn(
            f"an optimizer holds what {_few(computed)} computes from its float weight, not the weight: training that "
            f"changes nothing. {_ADVICE}",
            UserWarning,
            stacklevel=2,
        )
    missing = [name for name in untrained_weights(module, tensors) if name not in computed]
    if missing:
        warnings.warn(
            f"no optimizer holds the weight of {_few(missing)}, while optimizers hold other parameters beside it: it "
            f"will not be trained. {_ADVICE}. If it should not be trained, set requires_grad=False on it",
            UserWarning,
            stacklevel=2,
        )


def computed_weights(module: nn.Module, tensors: Iterable[torch.Tensor]) -> list[str]:
    """Names of quantized layers whose computed weights are among `tensors`."""
    own = {id(p) for p in module.parameters()}
    foreign = [tensor.detach() for tensor in tensors if id(tensor) not in own]
    names = []
    for name, layer in module.named_modules() if foreign else ():
        if weight_quantizer(layer) is None:
            continue
        shape = layer.parametrizations["weight"].original.shape
        alike = [tensor for tensor in foreign if tensor.shape == shape]
        if alike:
            weight = layer.weight.detach()
            names += [name] * any(torch.equal(tensor.to(weight), weight) for tensor in alike)
    return names


def untrained_weights(module: nn.Module, tensors: Iterable[torch.Tensor]) -> list[str]:
    """Names of quantized layers whose weights are not among `tensors`, though what is beside them is.

    Beside a weight are biases and parameters of norms: of its layer, or of the nearest module around it that has any.
    Those of layers whose own weights are held say nothing: optimizers of a head alone leave the rest on purpose.
    """
    held = {id(tensor) for tensor in tensors}
    modules = dict(module.named_modules())
    trained = {name for name, layer in modules.items() if _matrices(layer) & held}
    small = {
        name: {id(p) for p in layer.parameters(recurse=False) if p.ndim < 2 and p.requires_grad}
        for name, layer in modules.items()
        if name not in trained and not isinstance(layer, Quantizer)
    }
    names = []
    for name, layer in modules.items():
        weight = float_parameter(layer)
        if weight is None or not weight.requires_grad or id(weight) in held:
            continue
        for around in _outwards(name):
            prefix = f"{around}." if around else ""
            beside = set().union(*(ids for other, ids in small.items() if f"{other}.".startswith(prefix)))
            if beside:
                names += [name] * bool(beside & held)
                break
    return names


def _matrices(layer: nn.Module) -> set[int]:
    """Identities of the weights of two or more dimensions that a layer has, not those of layers in it."""
    own = [p for p in layer.parameters(recurse=False) if p.ndim > 1]
    if parametrize.is_parametrized(layer):
        own += [p for p in layer.parametrizations.parameters() if p.ndim > 1]  # type: ignore[union-attr]
    return {id(p) for p in own}


def _outwards(name: str) -> Iterable[str]:
    """A module's name and those of the modules around it, up to the whole."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _few(names: Sequence[str]) -> str:
    """At most three names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)} layers)" if len(names) > 3 else "")
