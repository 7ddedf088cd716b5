"""Where quantizers sit on a model, and how to find them: always on the modules, never in a table beside them."""

import os
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from lq.errors import StateError
from lq.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer

#: Attribute of a layer that holds the quantizer of its input.
INPUT = "input_quantizer"

#: Prefix, within a layer's state dict, of the state of its weight's quantizer.
WEIGHT_STATE = "parametrizations.weight.0."


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a weight matrix or kernel of their own, once each, by name; quantizers are not looked into."""
    for name, module in model.named_modules():
        if isinstance(module, (Quantizer, parametrize.ParametrizationList)):
            continue
        weight = float_weight(module)
        if weight is not None and weight.ndim >= 2:
            yield name, module


def float_weight(module: nn.Module) -> nn.Parameter | None:
    """The float weight of a layer, quantized or not (reading ``module.weight`` would compute the quantized one).

    None if it has none, or if a parametrization that is not lq's (weight norm, say) makes it.
    """
    if weight_quantizer(module) is not None:
        return module.parametrizations["weight"].original  # type: ignore[index, union-attr, no-any-return]
    return module._parameters.get("weight")


def is_attached(model: nn.Module) -> bool:
    """Whether any part of the model has quantizers."""
    return any(isinstance(module, Quantizer) for module in model.modules())


def require_attached(model: nn.Module, caller: str) -> None:
    """Raise an error that names the fix if the model has no quantizers."""
    if not is_attached(model):
        raise StateError(
            f"{caller} needs a model with quantizers, {type(model).__name__} has none; "
            "call lq.attach(model, ...) first, or put the Quantize callback before this one"
        )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with a quantizer on their weight or input, by name."""
    for name, module in model.named_modules():
        if weight_quantizer(module) is not None or input_quantizer(module) is not None:
            yield name, module


def weight_quantizer(module: nn.Module) -> WeightQuantizer | None:
    """The quantizer of a layer's weight, if it has one."""
    if parametrize.is_parametrized(module, "weight"):
        for parametrization in module.parametrizations["weight"]:  # type: ignore[index]
            if isinstance(parametrization, WeightQuantizer):
                return parametrization
    return None


def input_quantizer(module: nn.Module) -> ActivationQuantizer | None:
    """The quantizer of a layer's input, if it has one."""
    found = module._modules.get(INPUT)
    return found if isinstance(found, ActivationQuantizer) else None


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantizers of a model."""
    return (module for module in model.modules() if isinstance(module, Quantizer))


def common_module(model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost module that holds all quantized layers, and its name: the network in a LightningModule."""
    names = [name.split(".") for name, _ in quantized_layers(model)]
    inside = os.path.commonprefix([name[:-1] for name in names])
    name = ".".join(inside)
    return name, model.get_submodule(name)
