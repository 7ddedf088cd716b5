"""The quantizers of a unit: what of it is learned, and what earlier units have settled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lq.attachment.shared import SharedQuantizer
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.reconstruction.quantized_model import QuantizedModel
from lq.reconstruction.units import Unit


class UnitQuantizers:
    """The quantizers of a unit.

    Args:
        model: the model that the unit is a part of.
        modules: the modules of the unit.
        settled: identities of weights, biases and quantizers that earlier units have settled.

    Attributes:
        layers: layers in the unit.
        weights: quantizers, and the float weights they round; those that this unit decides.
        activations: quantizers of activations in the unit.
        learned: those of them that this unit decides.
        biases: biases of the layers of `weights`, those that this unit decides.
    """

    def __init__(self, model: QuantizedModel, modules: Sequence[nn.Module], settled: set[int]) -> None:
        self.layers = model.layers_in(modules)
        weights: dict[int, tuple[WeightQuantizer, nn.Parameter]] = {}
        for layer in self.layers:
            if layer.quantizer is not None and id(layer.weight) not in settled:
                weights.setdefault(id(layer.weight), (layer.quantizer, layer.weight))
        self.weights = list(weights.values())
        parts = [part for module in modules for part in module.modules()]
        shared = [part.owner for part in parts if isinstance(part, SharedQuantizer)]
        activations = [*(part for part in parts if isinstance(part, ActivationQuantizer)), *shared]
        self.activations = list({id(quantizer): quantizer for quantizer in activations}.values())
        self.learned = [quantizer for quantizer in self.activations if id(quantizer) not in settled]
        biases = [layer.module._parameters.get("bias") for layer in self.layers if id(layer.weight) in weights]
        self.biases = list({id(b): b for b in biases if b is not None and id(b) not in settled}.values())

    def state(self) -> list[Tensor]:
        """The tensors that this unit decides."""
        steps = [state for quantizer in self.learned for state in (quantizer.log2_step, quantizer.zero_point)]
        return [*(weight for _, weight in self.weights), *self.biases, *steps]

    def settled(self) -> set[int]:
        """Identities of what this unit decides."""
        return {id(part) for part in (*(weight for _, weight in self.weights), *self.learned, *self.biases)}


def quantizers_of(model: QuantizedModel, units: Sequence[Unit]) -> list[UnitQuantizers]:
    """The quantizers of each unit, in the order they run; what several units share is the first one's."""
    by_unit: list[UnitQuantizers] = []
    settled: set[int] = set()
    for unit in units:
        by_unit.append(UnitQuantizers(model, unit.bind(model.model), settled))
        settled |= by_unit[-1].settled()
    return by_unit


@contextmanager
def tapped(quantizer: WeightQuantizer | ActivationQuantizer, tap: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a quantizer return what `tap` makes of its tensor."""
    before, quantizer.tap = quantizer.tap, tap
    try:
        yield
    finally:
        quantizer.tap = before
