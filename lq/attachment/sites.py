"""Where quantizers sit on a model, and how to find them: always on the modules, never in a table beside them."""

import os
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from lq.attachment.interception import call_quantizers
from lq.attachment.shared import SharedQuantizer
from lq.errors import StateError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.site import Site

#: Attributes of a module that hold the quantizers of its input and of its output.
INPUT = "input_quantizer"
OUTPUT = "output_quantizer"

#: Prefix, within a layer's state dict, of the state of its weight's quantizer.
WEIGHT_STATE = "parametrizations.weight.0."


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a weight matrix or kernel of their own, once each, by name; quantizers are not looked into."""
    for name, module in model.named_modules():
        if isinstance(module, (Quantizer, parametrize.ParametrizationList, SharedQuantizer)):
            continue
        weight = float_weight(module)
        if weight is not None and weight.ndim >= 2 and weight.is_floating_point():
            yield name, module


def float_weight(module: nn.Module) -> nn.Parameter | None:
    """The float weight of a layer, quantized or not (reading ``module.weight`` would compute the quantized one).

    None if it has none, or if a parametrization that is not lq's (weight norm, say) makes it.
    """
    quantizer = weight_quantizer(module)
    if quantizer is None:
        return module._parameters.get("weight")
    quantizer.take_over_writes()
    return module.parametrizations["weight"].original  # type: ignore[index, union-attr, no-any-return]


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
    """The quantizer of a layer's input, if it has one; its own or one that it shares."""
    part = module._modules.get(INPUT)
    if isinstance(part, SharedQuantizer):
        return part.owner
    return part if isinstance(part, ActivationQuantizer) else None


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All quantizers of activations, once each, by the name of their site."""
    return {q.name: q for q in quantizers(model) if isinstance(q, ActivationQuantizer)}


def calls(model: nn.Module) -> dict[str, dict[str, Quantizer]]:
    """Calls with quantizers by name of module and call, and their quantizers by operand."""
    by_call: dict[str, dict[str, Quantizer]] = {}
    for name, module in model.named_modules():
        for place, quantizer in call_quantizers(module).items():
            site = Site(name, place, "activation")
            operand = site.name[len(site.layer) + 1 :]
            one = quantizer.owner if isinstance(quantizer, SharedQuantizer) else quantizer
            if isinstance(one, Quantizer):
                by_call.setdefault(site.layer, {})[operand] = one
    return by_call


def weights_at_calls(model: nn.Module) -> Iterator[WeightQuantizer]:
    """Quantizers of weights that are quantized where a function uses them."""
    for module in model.modules():
        yield from (q for q in call_quantizers(module).values() if isinstance(q, WeightQuantizer))


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantizers of a model."""
    return (module for module in model.modules() if isinstance(module, Quantizer))


def common_module(model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost module that holds all quantized layers (all layers if none is), and its name: the network."""
    names = [name for name, _ in quantized_layers(model)] or [name for name, _ in layers(model)]
    name = ".".join(os.path.commonprefix([name.split(".")[:-1] for name in names]))
    return name, model.get_submodule(name)


def copy_quantizers(source: nn.Module, target: nn.Module) -> None:
    """Give the quantizers of a copy of a model the state of those of the model."""
    for mine, theirs in zip(quantizers(source), quantizers(target), strict=True):
        theirs.load_state_dict(mine.state_dict())
