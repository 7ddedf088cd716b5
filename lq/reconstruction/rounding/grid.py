"""The weights of a unit end to end in one vector, with the grid that each of them lies on.

What is learned of the rounding is one tensor then, however many layers the unit has: no work is done layer by layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lq.quantizer.rounding import Bound, round_to_grid
from lq.quantizer.weight_quantizer import WeightQuantizer


class WeightGrid:
    """Weights in steps of their grids.

    Args:
        pairs: quantizers, and the float weights they round.

    Attributes:
        values: the weights, in steps; shape (W,), float32.
        step: distance of two levels; shape (W,).
        low: lowest level, in steps; a number if it is the same for all, else shape (W,).
        high: highest level, in steps; likewise.
        offset: 0 where levels are multiples of the step, 0.5 where they lie halfway between; likewise.
    """

    def __init__(self, pairs: Sequence[tuple[WeightQuantizer, nn.Parameter]]) -> None:
        self.quantizers = [quantizer for quantizer, _ in pairs]
        self.weights = [weight for _, weight in pairs]
        self._sizes = [weight.numel() for weight in self.weights]
        device = self.weights[0].device if pairs else None
        with torch.no_grad():
            bounds = [quantizer.bounds for quantizer in self.quantizers]
            self.low, self.high, self.offset = (self._joined([b[i] for b in bounds], device) for i in range(3))
            self.step = self._flat([quantizer.step for quantizer in self.quantizers], device)
            flat = [weight.detach().float().reshape(-1) for weight in self.weights]
            self.values = (torch.cat(flat) if flat else torch.zeros(0)) / self.step

    def _joined(self, parts: Sequence[Bound], device: torch.device | None) -> Bound:
        numbers = {part for part in parts if not isinstance(part, Tensor)}
        if len(numbers) <= 1 and not any(isinstance(part, Tensor) for part in parts):
            return numbers.pop() if numbers else 0.0
        return self._flat(parts, device)

    def _flat(self, parts: Sequence[Bound], device: torch.device | None) -> Tensor:
        """One number for each weight, of one for each tensor or for each of its channels."""
        flat = [torch.zeros(0, device=device)]
        for part, quantizer, weight in zip(parts, self.quantizers, self.weights, strict=True):
            like = quantizer.layout.split(weight)
            spread = quantizer.layout.spread(torch.as_tensor(part, dtype=torch.float32, device=device), weight)
            flat.append(spread.expand(like.shape).reshape(-1))
        return torch.cat(flat)

    @property
    def bounds(self) -> tuple[Bound, Bound, Bound]:
        """Lowest level, highest level and offset."""
        return self.low, self.high, self.offset

    def tensors(self, levels: Tensor) -> list[Tensor]:
        """Weights of these levels, each in its own shape."""
        return self.split(levels * self.step)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parts of a vector (W,) that belong to the weights, in their shapes."""
        return [part.view(weight.shape) for part, weight in zip(flat.split(self._sizes), self.weights, strict=True)]

    def nearest(self, values: Tensor | None = None) -> Tensor:
        """The nearest levels to `values`, by default to the weights; shape (W,)."""
        values = self.values if values is None else values
        return round_to_grid(values, torch.ones((), device=values.device), self.low, self.high, self.offset)

    @torch.no_grad()
    def prefer(self, levels: Tensor) -> None:
        """Move the values halfway to `levels`, (W,), and at least so far that these are the nearest ones."""
        self.values = levels + ((self.values - levels) / 2).clamp(-0.45, 0.45)

    def clamp(self, levels: Tensor) -> Tensor:
        """`levels` within the grid; differentiable."""
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return torch.minimum(torch.maximum(levels, torch.as_tensor(self.low)), torch.as_tensor(self.high))
        return levels.clamp(self.low, self.high)

    @torch.no_grad()
    def write(self, levels: Tensor) -> None:
        """Give the weights the values of `levels`, which rounding to the nearest level leaves as they are."""
        for weight, values in zip(self.weights, self.tensors(levels), strict=True):
            weight.copy_(values)
