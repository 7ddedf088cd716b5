"""A copy of a quantized model in standard operators, with nothing of lq in it: what every exporter starts from.

Activations pass a quantize and a dequantize operator; weights are integers behind a dequantize operator. They are
buffers of signed levels (int8; zero point 0) or, on grids that are not symmetric, of codes (uint8). The two-level grid
of a symmetric channel, ``+-s/2``, becomes the levels -1 and 1 of half the step.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.interception import call_quantizers
from lq.attachment.running import CALLS
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import float_weight, require_attached, weight_quantizer
from lq.attachment.stored import CallWeight, call_weights
from lq.export.integers import IntegerWeight, as_integers, settled_zero_point
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.final_widths import warn_if_unfinished
from lq.quantizer.log_quantizer import LogQuantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.channels import ChannelLayout

# Integer types by width, of codes and of signed levels.
_CODES = ((8, torch.uint8), (16, torch.uint16))
_LEVELS = ((8, torch.int8), (16, torch.int16))


def standard_form(model: nn.Module) -> nn.Module:
    """A copy of `model`, in eval mode, whose quantizers are standard operators; its outputs are the same.

    Raises:
        StateError: if the model has no quantizers, or one of them has no range or a width that is being learned.
    """
    require_attached(model, "export")
    warn_if_unfinished(model, f"{type(model).__name__}, which is exported,")
    _operators()
    made = copy.deepcopy(model).eval().requires_grad_(False)
    weights: dict[int, StandardWeight] = {}
    activations: dict[int, nn.Module] = {}
    for module in list(made.modules()):
        quantizer, weight = weight_quantizer(module), float_weight(module)
        if quantizer is not None and weight is not None:
            if id(quantizer) not in weights:
                weights[id(quantizer)] = StandardWeight(as_integers(quantizer, weight), weight.dtype)
            _replace_weight(module, weights[id(quantizer)])
    for module in list(made.modules()):
        for name, part in list(module._modules.items()):
            owner = part.owner if isinstance(part, SharedQuantizer) else part
            if isinstance(owner, ActivationQuantizer) and owner.unreached:
                module._modules[name] = nn.Identity()  # as it does in eval mode
            elif isinstance(owner, ActivationQuantizer):
                if id(owner) not in activations:
                    activations[id(owner)] = (
                        StandardLog(owner) if isinstance(owner, LogQuantizer) else StandardActivation(owner)
                    )
                module._modules[name] = activations[id(owner)]
    at_calls = {(call.module, call.place): call for call in call_weights(made)}
    functions: dict[tuple[object, ...], nn.Module] = {}
    for name, module in list(made.named_modules()):
        for place in list(call_quantizers(module)):
            if (name, place) in at_calls:
                module.get_submodule(CALLS).add_module(place, _weight_of_call(at_calls[name, place], functions))
    _drop(made, {id(call.parameter) for call in at_calls.values() if not call.reason})
    return made


class StandardWeight(nn.Module):
    """Parametrization of a buffer of integers that gives the weight.

    Args:
        integers: the weight.
        dtype: type of the float weight.
    """

    step: Tensor | float
    zero_point: Tensor | int

    def __init__(self, integers: IntegerWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = integers.layout
        self.dtype = dtype
        self.levels, step, zero_point = _signed(integers)
        if step.ndim == 0:  # operators for a whole tensor take numbers
            self.step, self.zero_point = float(step), int(zero_point)
        else:
            self.register_buffer("step", step)
            self.register_buffer("zero_point", zero_point)

    def forward(self, levels: Tensor) -> Tensor:
        """The weight."""
        return _dequantized(levels, self.step, self.zero_point, self.layout).to(self.dtype)


class StandardActivation(nn.Module):
    """Quantize and dequantize a tensor.

    Args:
        quantizer: what it stands for.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        zero_point = float(settled_zero_point(quantizer))
        bits = int(quantizer.bits.detach())
        self.name = quantizer.name
        self.scale = float(quantizer.step.detach())
        self.high = 2**bits - 1
        self.zero_point = min(max(math.floor(zero_point + 0.5), 0), self.high)
        self.shift = (self.zero_point - zero_point) * self.scale  # of grids that have no zero
        self.dtype = _fitting(_CODES, bits)
        self.pruned = bits == 0

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid; same shape and dtype."""
        if self.pruned:
            return torch.zeros_like(x)
        ops: Any = torch.ops.quantized_decomposed
        largest = torch.iinfo(self.dtype).max
        grid = self.scale, self.zero_point, 0, largest, self.dtype
        codes = ops.quantize_per_tensor((x.float() - self.shift) if self.shift else x.float(), *grid)
        if self.high < largest:  # not left to the operator: ONNX's knows the limits of types only
            codes = codes.clamp(0, self.high)  # a Clip: onnxruntime 1.23 has no Min of 8-bit integers
        values = ops.dequantize_per_tensor(codes, *grid)
        return ((values + self.shift) if self.shift else values).to(x.dtype)  # type: ignore[no-any-return]


class StandardLog(nn.Module):
    """Round a tensor to logarithmic levels, in float.

    Args:
        quantizer: what it stands for.
    """

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        settled_zero_point(quantizer)
        self.name = quantizer.name
        self.scale, base, self.shift, self.rest = (float(part) for part in quantizer.log_grid)
        self.base = base * math.log(2)
        self.last = 2 ** int(quantizer.bits.detach()) - 1

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the levels; same shape and dtype."""
        if not self.last:
            return torch.zeros_like(x)
        values = ((x.float() + self.shift) / self.scale).clamp(min=2.0**-100)
        codes = (torch.log(values) / -self.base).round().clamp(0, self.last)
        levels = torch.exp(codes * -self.base) * self.scale - self.shift
        is_level = (codes < self.last).to(levels.dtype)
        rounded: Tensor = levels * is_level + (1 - is_level) * self.rest
        return rounded.to(x.dtype)


def _replace_weight(module: nn.Module, standard: StandardWeight) -> None:
    """Put a buffer of integers in the place of a layer's float weight, and what gives the weight in the quantizer's."""
    table: Any = module.parametrizations["weight"]  # type: ignore[index]
    del table.original
    table.register_buffer("original", standard.levels)
    table[0] = standard


def _weight_of_call(call: CallWeight, made: dict[tuple[object, ...], nn.Module]) -> nn.Module:
    """What stands for the quantizer of a weight at a call; calls of the same weight share it."""
    quantizer, weight = call.quantizer, call.weight
    if call.reason or call.source is None or weight is None:
        return RoundedWeight(quantizer)
    key = call.key, call.source.offset, call.source.shape, call.source.stride
    if key not in made:
        made[key] = WeightOfCall(as_integers(quantizer, weight), weight.dtype)
    return made[key]


class WeightOfCall(nn.Module):
    """Gives a function its weight, from a buffer of integers.

    Args:
        integers: the weight.
        dtype: type of the float weight.
    """

    levels: Tensor

    def __init__(self, integers: IntegerWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.standard = StandardWeight(integers, dtype)
        self.register_buffer("levels", self.standard.levels)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, whatever has taken its place among the parameters."""
        return self.standard(self.levels)  # type: ignore[no-any-return]


class RoundedWeight(nn.Module):
    """Rounds a weight that a function computes, where it is multiplied: by operators, if they have such a grid.

    Args:
        quantizer: what it stands for.
    """

    step: Tensor
    zero_point: Tensor
    bits: Tensor
    zeros: Tensor

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.register_buffer("zero_point", settled_zero_point(quantizer))
        self.register_buffer("bits", quantizer.bits.detach().clone())
        self.register_buffer("step", quantizer.step.detach().clone())
        self.layout = quantizer.layout
        width, zero_point = int(self.bits.max()), self.zero_point
        whole = not bool((zero_point % 1).any()) and bool(((zero_point >= 0) & (zero_point < 2**width)).all())
        self.by_operators = whole and 2 <= width <= 8 and bool((self.bits == width).all()) and self.layout.groups == 1
        signed = bool((zero_point == 2 ** (width - 1)).all())
        low = -(2 ** (width - 1)) if signed else 0
        self.register_buffer("zeros", (torch.zeros_like(zero_point) if signed else zero_point).long())
        self.limits = low, low + 2**width - 1, torch.int8 if signed else torch.uint8

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` rounded to the grid; same shape and dtype."""
        ops: Any = torch.ops.quantized_decomposed
        x, spread = weight.float(), self.layout.spread
        if self.by_operators and self.step.ndim == 0:
            one = float(self.step), int(self.zeros), *self.limits
            return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *one), *one).to(weight.dtype)  # type: ignore[no-any-return]
        if self.by_operators:
            each = self.step, self.zeros, self.layout.dim, *self.limits
            return ops.dequantize_per_channel(ops.quantize_per_channel(x, *each), *each).to(weight.dtype)  # type: ignore[no-any-return]
        step, zero_point, bits = (spread(part, weight) for part in (self.step, self.zero_point, self.bits))
        offset = torch.remainder(-zero_point, 1.0)
        levels = (self.layout.split(x) * step.reciprocal() - offset).round() + offset
        levels = torch.minimum(torch.maximum(levels, -zero_point), torch.exp2(bits) - 1 - zero_point)
        return self.layout.join(levels * step).to(weight.dtype)


def _drop(model: nn.Module, parameters: set[int]) -> None:
    """Put tensors of one element that look like them in the place of parameters that nothing reads any more."""
    for module in model.modules():
        lost = {name: p for name, p in module._parameters.items() if id(p) in parameters and p is not None}
        for name, parameter in lost.items():
            empty = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            del module._parameters[name]
            setattr(module, name, empty)  # recurrent modules put it into their list of weights, too


def _signed(integers: IntegerWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, steps and integer zero points: levels around 0 where the grid is symmetric, else codes."""
    codes, zero_point, bits = integers.codes.long(), integers.zero_point, integers.bits
    kept = integers.step[bits > 0]
    step = torch.where(bits > 0, integers.step, kept.min() if kept.numel() else 1.0)
    split, spread, join = integers.layout.split, integers.layout.spread, integers.layout.join
    two = zero_point % 1 != 0
    factor = torch.where(two, 2, 1)
    levels = join(split(codes) * spread(factor, codes) - spread((zero_point * factor).long(), codes))
    step = torch.where(two, step / 2, step)
    widest = max(int(bits.max()), 2)
    if bool((two | (bits == 0) | (zero_point == 2.0 ** (bits - 1))).all()):
        return levels.to(_fitting(_LEVELS, widest)), step, torch.zeros_like(bits)
    if bool(two.any()) or widest > 8 or bool((zero_point < 0).any() or (zero_point > 255).any()):
        return levels.to(torch.int32), step, torch.zeros_like(bits)  # no operator's codes and zero points
    return codes.to(torch.uint8), step, zero_point.long()


def _dequantized(levels: Tensor, step: Tensor | float, zero_point: Tensor | int, layout: ChannelLayout) -> Tensor:
    ops: Any = torch.ops.quantized_decomposed
    if levels.dtype == torch.int32 or (layout.groups > 1 and isinstance(step, Tensor)):  # channels in groups
        if not isinstance(step, Tensor) or not isinstance(zero_point, Tensor):
            return (levels.float() - zero_point) * step
        values = layout.split(levels.float()) - layout.spread(zero_point, levels)
        return layout.join(values * layout.spread(step, levels))
    info = torch.iinfo(levels.dtype)
    rest = info.min, info.max, levels.dtype
    if isinstance(step, float):
        return ops.dequantize_per_tensor(levels, step, zero_point, *rest)  # type: ignore[no-any-return]
    return ops.dequantize_per_channel(levels, step, zero_point, layout.dim, *rest)  # type: ignore[no-any-return]


def _fitting(types: tuple[tuple[int, torch.dtype], ...], bits: int) -> torch.dtype:
    return next(dtype for width, dtype in types if bits <= width)


def _operators() -> None:
    """Register the operators."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401
