"""Lightning's ModelPruning beside quantizers: masks go on the float weights, and zeros stay zeros through rounding.

A quantized layer computes its ``weight``. ModelPruning, which looks for Parameters of that name, is shown the module as
it was (`lq.attachment.float_view`), and is given in place of each quantized weight the Parameter behind it:
``(layer.parametrizations.weight, "original")``. Zero is a level of all grids of two bits and more. What other libraries
compute from a weight that is quantized already is refused.
"""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lq.attachment.float_view import as_float, float_parameter
from lq.attachment.sites import weight_quantizer
from lq.errors import StateError

#: What ModelPruning is given to prune: modules, and names of their parameters.
Prunable = list[tuple[nn.Module, str]]


def prune_float_weights(trainer: pl.Trainer, quantizing: pl.Callback) -> None:
    """Have the ModelPruning callbacks of a Trainer, in their setup, choose the float weights of quantized layers.

    Raises:
        StateError: if one of them has chosen before the module was quantized, or draws new weights.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for index, callback in enumerate(callbacks):
        if not _is_pruning(callback):
            continue
        if index < callbacks.index(quantizing):
            raise StateError(
                f"{type(callback).__name__} is listed before {type(quantizing).__name__} and would look for weights to "
                f"prune that are computed later; list {type(quantizing).__name__} before it in Trainer(callbacks=[...])"
            )
        if getattr(callback, "_resample_parameters", False):
            raise StateError(
                f"{type(callback).__name__}(resample_parameters=True) draws new weights by the reset_parameters of the "
                "layers, which makes no sense of quantized ones; use resample_parameters=False"
            )
        _adapt(callback)


def check_zeros(trainer: pl.Trainer, module: nn.Module) -> None:
    """Raise if a ModelPruning is to prune a weight whose grid has no zero.

    Raises:
        StateError: naming the layers.
    """
    without = _without_zero(trainer, module)
    if without:
        raise StateError(
            f"ModelPruning cannot prune {without}: the weight's grid has no zero, as at 1 bit; give these layers 2 "
            "bits or more with Quantize(overrides={...}), or name others with ModelPruning(parameters_to_prune=[...])"
        )


def warn_of_lost_zeros(trainer: pl.Trainer, module: nn.Module) -> None:
    """Warn if training has brought pruned weights to a grid without a zero."""
    without = _without_zero(trainer, module)
    if without:
        warnings.warn(
            f"the pruned weights of {without} are not zero any more: training has brought their width to 1 bit, whose "
            "grid has no zero; keep these layers at 2 bits or more",
            UserWarning,
            stacklevel=2,
        )


def check_parametrizations(module: nn.Module) -> None:
    """Raise if something computes a weight from the quantized one: it would not be on the grid, or not in exports.

    Raises:
        StateError: naming the layer and the parametrization.
    """
    for name, layer in module.named_modules():
        quantizer = weight_quantizer(layer)
        steps = [] if quantizer is None else list(layer.parametrizations["weight"])
        others = [type(step).__name__ for step in steps if step is not quantizer]
        if others:
            raise StateError(
                f"{name}.weight has the parametrization {others[0]} beside its quantizer; register it before the "
                "module is quantized, so that what it gives is what is quantized, or exclude the layer"
            )


def _without_zero(trainer: pl.Trainer, module: nn.Module) -> str:
    """The layers that are to be pruned though their grids have no zero: at most three names, and how many more."""
    chosen = {
        id(part)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for part in getattr(getattr(callback, "filter_parameters_to_prune", None), "weights", [])
    }
    names = []
    for name, layer in module.named_modules():
        quantizer, weight = weight_quantizer(layer), float_parameter(layer)
        if quantizer is None or weight is None or id(layer.parametrizations["weight"]) not in chosen:
            continue
        if quantizer.calibrated and quantizer.tap is None:
            with torch.no_grad():
                if bool(quantizer(torch.zeros_like(weight)).any()):
                    names.append(name)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_pruning(callback: pl.Callback) -> bool:
    """By name: the same in both packages that Lightning comes as."""
    return any(base.__name__ == "ModelPruning" for base in type(callback).__mro__)


def _adapt(callback: Any) -> None:
    """Have a ModelPruning see float layers when it checks what to prune, and get their Parameters."""
    if "sanitize_parameters_to_prune" in vars(callback):
        return
    check, choose = callback.sanitize_parameters_to_prune, callback.filter_parameters_to_prune
    layers: dict[int, nn.Module] = {}  # by the identity of what makes their weight

    def sanitize_parameters_to_prune(module: nn.Module, chosen: Any = (), **kwargs: Any) -> Any:
        layers.clear()
        for layer in module.modules():
            if weight_quantizer(layer) is not None:
                layers[id(layer.parametrizations["weight"])] = layer  # type: ignore[index]
        chosen = [(layers.get(id(part), part), "weight" if id(part) in layers else name) for part, name in chosen]
        with as_float(module):
            return check(module, chosen, **kwargs)

    def filter_parameters_to_prune(chosen: Prunable = ()) -> Prunable:  # type: ignore[assignment]
        found = [_behind(layer, name) for layer, name in choose(chosen)]
        filter_parameters_to_prune.weights = [part for part, name in found if name == "original"]  # type: ignore[attr-defined]
        return found

    callback.sanitize_parameters_to_prune = sanitize_parameters_to_prune
    callback.filter_parameters_to_prune = filter_parameters_to_prune


def _behind(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where the Parameter is that a layer's parameter of that name is computed from."""
    if name == "weight" and weight_quantizer(layer) is not None:
        return layer.parametrizations["weight"], "original"  # type: ignore[index, return-value]
    return layer, name
