"""The layers and quantizers of a model, looked up once for all that reconstruction does with them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lq.attachment.sites import common_module, float_weight, quantizers, weight_quantizer
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.weight_quantizer import WeightQuantizer


@dataclass(frozen=True)
class Layer:
    """A module with a weight of its own.

    Args:
        name: of the module in the model.
        module: the module.
        weight: its float weight.
        quantizer: of the weight, if it is quantized.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    quantizer: WeightQuantizer | None


class QuantizedModel:
    """A model with quantizers.

    Args:
        model: the model; layers and quantizers that come to it later are not known here.

    Attributes:
        quantizers: all quantizers, once each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.quantizers = list(quantizers(model))
        self._layers = {
            id(module): Layer(name, module, weight, weight_quantizer(module))
            for name, module in model.named_modules()
            if (weight := float_weight(module)) is not None
        }

    @property
    def activations(self) -> list[ActivationQuantizer]:
        """The quantizers of activations."""
        return [quantizer for quantizer in self.quantizers if isinstance(quantizer, ActivationQuantizer)]

    @property
    def weighted(self) -> list[str]:
        """Names of the layers whose weight is quantized."""
        return [layer.name for layer in self._layers.values() if layer.quantizer is not None]

    @property
    def network(self) -> str:
        """Name of the innermost module that holds all quantized layers."""
        return common_module(self.model)[0]

    def layers_in(self, modules: Sequence[nn.Module]) -> list[Layer]:
        """The layers among `modules` and in them."""
        parts = (part for module in modules for part in module.modules())
        return [self._layers[id(part)] for part in parts if id(part) in self._layers]
