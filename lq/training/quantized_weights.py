"""The weights of a model that are behind quantizers, as what looks at them between two steps needs them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq.attachment.float_view import float_parameter
from lq.attachment.sites import weight_quantizer
from lq.attachment.stored import stored_weights
from lq.quantizer.rounding import Bound, clamp_levels, round_levels
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.sources import Source


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A float weight and its quantizer.

    Args:
        name: name of the quantizer.
        quantizer: its quantizer.
        parameter: the Parameter that holds it.
        source: which part of the Parameter it is; None: all of it.
    """

    name: str
    quantizer: WeightQuantizer
    parameter: nn.Parameter
    source: Source | None = None

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.parameter.numel() if self.source is None else self.source.numel

    @property
    def values(self) -> Tensor:
        """The float weight; it shares the memory of the Parameter, and has no gradient."""
        return self._part(self.parameter.detach())

    @property
    def grad(self) -> Tensor | None:
        """The gradient to it, likewise; None: there is none, or it is sparse."""
        grad = self.parameter.grad
        if grad is None or grad.is_sparse or (self.source is not None and not grad.is_contiguous()):
            return None
        return self._part(grad)

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor if self.source is None else self.source.view(tensor)

    def split(self, values: Tensor) -> Tensor:
        """Values in the weight's shape, or flat ones in its order, such that what `spread` gives broadcasts."""
        return self.quantizer.layout.split(values.view(self.values.shape))

    def spread(self, part: Bound) -> Bound:
        """A number for all values, or one for each channel shaped to broadcast."""
        return self.quantizer.layout.spread(part, self.values) if isinstance(part, Tensor) else part

    @property
    def step(self) -> Tensor:
        """The step, shaped to broadcast."""
        return self.quantizer.layout.spread(self.quantizer.step.detach(), self.values)

    def bounds(self) -> tuple[Bound, Bound, Bound]:
        """Lowest and highest level, and the offset of levels from integers, shaped to broadcast."""
        low, high, offset = (self.spread(bound) for bound in self.quantizer.bounds)
        return low, high, offset

    def levels(self, bounds: tuple[Bound, Bound, Bound], out: Tensor | None = None) -> Tensor:
        """The levels that the values are rounded to now, split; float32."""
        low, high, offset = bounds
        values = self.split(self.values).float()
        return clamp_levels(round_levels(torch.mul(values, self.step.reciprocal(), out=out), offset), low, high)


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """The weights that have a range: of layers, and of functions where they are stored as codes; once each."""
    found = []
    for module in model.modules():
        quantizer, parameter = weight_quantizer(module), float_parameter(module)
        if quantizer is not None and parameter is not None:
            found.append(QuantizedWeight(quantizer.name, quantizer, parameter))
    for call in stored_weights(model):
        if call.parameter is not None and call.source is not None:
            part = call.source if call.source.stride is not None else None
            if part is None or call.parameter.is_contiguous():
                found.append(QuantizedWeight(call.quantizer.name, call.quantizer, call.parameter, part))
    once = {(id(w.parameter), w.source): w for w in reversed(found)}
    used = {id(weight) for weight in once.values()}
    return [w for w in found if id(w) in used and w.quantizer.calibrated]
