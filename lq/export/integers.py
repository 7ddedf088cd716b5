"""The integers that quantized weights are: codes, steps and zero points."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq.attachment.sites import float_weight, require_attached, weight_quantizer
from lq.attachment.stored import call_weights
from lq.errors import StateError
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers: ``(codes - zero_point) * step`` is what the layer multiplies by.

    Args:
        codes: ``0 .. 2**bits - 1``, shaped like the weight; uint8, or int32 if a width is over 8 bits.
        step: distance of two levels, float32, shape () or (C,).
        zero_point: code of zero, float32, likewise. An integer, but for two-level channels, which have no zero: 0.5.
        bits: widths, int64, likewise; channels of 0 bits are pruned.
        layout: where the output channels of the weight lie.
    """

    codes: Tensor
    step: Tensor
    zero_point: Tensor
    bits: Tensor
    layout: ChannelLayout

    def dequantize(self) -> Tensor:
        """The weight, float32, equal to what the quantized layer uses."""
        spread = self.layout.spread
        levels = self.layout.split(self.codes).float() - spread(self.zero_point, self.codes)
        return self.layout.join(levels * spread(self.step, self.codes))


def integer_weights(model: nn.Module) -> dict[str, IntegerWeight]:
    """Codes, steps and zero points of all quantized weights, by name of the layer.

    Weights that functions use (those of ``nn.MultiheadAttention`` and of recurrent layers) have the name of the operand
    of the call, such as ``"lstm.rnn_0_weight_1"``. Those that are computed first, or that something reads in float as
    well, are not among them.

    Raises:
        StateError: if the model has no quantizers, or widths that are still being learned.

    >>> import lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(4, 3)), weights=2, first_last=None)
    >>> found = integer_weights(model)["0"]
    >>> int(found.codes.max()) <= 3 and torch.equal(found.dequantize(), model[0].weight)
    True
    """
    require_attached(model, "lq.integer_weights")
    found = {name: as_integers(quantizer, weight) for name, quantizer, weight in quantized_weights(model)}
    at_calls = ((call, call.weight) for call in call_weights(model) if not call.reason)
    return found | {call.name: as_integers(call.quantizer, w) for call, w in at_calls if w is not None}


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, WeightQuantizer, nn.Parameter]]:
    """Layers with a quantized weight, once for each name: the name, the quantizer, the float weight."""
    for name, module in model.named_modules(remove_duplicate=False):
        quantizer, weight = weight_quantizer(module), float_weight(module)
        if quantizer is not None and weight is not None:
            yield name, quantizer, weight


@torch.no_grad()
def as_integers(quantizer: WeightQuantizer, weight: Tensor) -> IntegerWeight:
    """A weight by its quantizer."""
    zero_point = settled_zero_point(quantizer)
    layout, step, bits = quantizer.layout, quantizer.step.detach(), quantizer.bits.detach()
    values = layout.split(quantizer(weight.float()))
    levels = values / layout.spread(step, weight) + layout.spread(zero_point, weight)
    codes = layout.join(levels.round()).to(torch.uint8 if bits.max() <= 8 else torch.int32)
    return IntegerWeight(codes, step, zero_point, bits.long(), layout)


@torch.no_grad()
def settled_zero_point(quantizer: Quantizer) -> Tensor:
    """The zero point that a quantizer rounds with, shaped like its widths.

    Raises:
        StateError: if it has no range, or its width is still being learned.
    """
    if not (quantizer.calibrated or quantizer.unreached):
        raise StateError(f"{quantizer.name} has no range yet: run lq.calibrate(model, batches) first")
    bits = quantizer.bits.detach()
    if not torch.equal(bits, bits.round()):
        raise StateError(
            f"{quantizer.name} has widths that are being learned ({bits.flatten()[:3].tolist()}...); "
            "let the training finish (LearnNoiseScale makes them integers), or call lq.set_bits"
        )
    low = quantizer.bounds[0]
    return -(low if isinstance(low, Tensor) else torch.full_like(bits, low)) + 0.0
