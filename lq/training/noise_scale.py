r"""Widths that are learned: steps and ranges of many quantizers as flat vectors, and what holds widths down.

By the noise scale (`lq.quantizer.estimators.noise_scale`) the width of a tensor or channel is ``I_alpha = log2(range /
s)`` bits; both logarithms are learned, so that a width falls as the noise grows or as the range shrinks, whichever
costs less. Widths are held down twice:

- by a penalty in the loss, ``t * C * excess`` (GDNSQ, arXiv 2508.14004): ``C`` is the mean loss so far, ``t`` grows
  with every step, and the excess is ``relu(width - target)``, averaged over weights and over activations, each
  weighed by its share of the targets that are not met; or, without targets for single tensors, the excess of the
  whole size over a budget;
- by a ceiling that falls from the widths at the start to the targets (or the budget, which is then used up): where
  GDNSQ trains until its targets are met, a run that ends after a given number of steps has to meet them.

A channel whose width falls below half a bit is pruned for good. `WidthLearner.settle` makes the widths integers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq.attachment.scheme import first_and_last
from lq.attachment.sites import activation_quantizers, float_weight, quantized_layers, quantizers, weight_quantizer
from lq.errors import SpecError
from lq.quantizer.levels import middle, without_rounding_error
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.spec import check_bits
from lq.structure.patterns import select
from lq.structure.site import Site
from lq.training.width_goals import LEAST, PRUNED, WITHIN

#: Bits above the target at which the way down begins.
HEAD = 2.0


def target_widths(
    model: nn.Module,
    weights: int | None,
    activations: int | None,
    *,
    first_last: int | None = 8,
    pins: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """The width that each quantizer of `model` should come down to, by its name.

    Args:
        model: a model with quantizers.
        weights: width of weights in bits; None: no target.
        activations: width of activations; None: no target.
        first_last: least width of the first and last layers' weights and of the last layer's input; None: no exception.
        pins: other widths, by name pattern of layers or sites.

    Raises:
        SpecError: for a width that does not exist.
        PatternError: for a pattern that matches nothing.
    """
    for bits in (weights, activations, first_last):
        if bits is not None:
            check_bits(bits)
    first, last = first_and_last(model, [name for name, _ in quantized_layers(model)])
    sites = activation_quantizers(model)
    found: dict[str, float] = {}
    layers: dict[str, str] = {}
    for quantizer in quantizers(model):
        module, _, place = quantizer.name.rpartition(".")
        layers[quantizer.name] = layer = Site(module, place, "weight").layer
        bits = activations if quantizer.name in sites else weights
        if bits is not None:
            edge = layer in last or (layer in first and quantizer.name not in sites)
            found[quantizer.name] = float(max(bits, first_last) if edge and first_last is not None and bits else bits)
    for pattern, bits in (pins or {}).items():
        chosen = select(pattern, [*layers, *dict.fromkeys(layers.values())], argument="pins")
        found.update({name: float(check_bits(bits)) for name, layer in layers.items() if {name, layer} & chosen})
    return found


@torch.no_grad()
def prune_silent(model: nn.Module) -> int:
    """Give channels of weights that are rounded to nothing but zeros a width of 0 bits: the forward stays the same.

    Returns:
        The number of channels pruned.
    """
    pruned = 0
    for module in model.modules():
        quantizer, weight = weight_quantizer(module), float_weight(module)
        if quantizer is None or weight is None or not quantizer.bits.ndim or quantizer.tap is not None:
            continue
        silent = (quantizer.layout.rows(quantizer(weight)) == 0).all(1) & (quantizer.bits > 0)
        if bool(silent.any()):
            pruned += int(silent.sum())
            quantizer.settle(quantizer.bits.detach().masked_fill(silent, 0.0))
    return pruned


@dataclass
class Penalty:
    """The penalty schedule: ``t * C`` with ``t`` growing after a warm-up and ``C`` the mean loss.

    Args:
        growth: what ``t`` grows by in one step; GDNSQ takes twice the learning rate.
        warmup: steps before it grows.
    """

    growth: float
    warmup: int = 0
    steps: int = 0
    loss: Tensor | float = 0.0

    def take(self, loss: Tensor | None) -> None:
        """Count a step and its loss; one that is not finite does not count."""
        self.steps += 1
        if loss is not None:
            value = loss.detach().float()
            mean = torch.as_tensor(self.loss, device=value.device)
            self.loss = torch.where(value.isfinite(), mean + (value - mean) / self.steps, mean)

    def factor(self) -> Tensor | float:
        """``t * C``."""
        return self.growth * max(self.steps - self.warmup, 0) * self.loss


class WidthLearner:
    """Steps, ranges and widths of quantizers, as flat vectors with one entry per step.

    Args:
        members: the quantizers.
        targets: widths to come down to, by name of quantizer, one or one for each step; others have none.

    Raises:
        SpecError: if a quantizer has no range yet, other than because calibration did not come to it: such quantizers
            keep their widths.
    """

    def __init__(self, members: Sequence[Quantizer], targets: Mapping[str, float | Tensor]) -> None:
        self.members = [quantizer for quantizer in members if not quantizer.unreached]
        for quantizer in self.members:
            if not quantizer.calibrated:
                raise SpecError(f"{quantizer.name} has no range to start from; run lq.calibrate(model, batches)")
        self.sizes = [max(q.bits.numel(), 1) for q in self.members]
        self.log2_step = nn.Parameter(self._flat("log2_step"))
        start = self._flat("bits")
        self.log2_range = nn.Parameter(self.log2_step.detach() + start)
        levels = torch.exp2(start) - 1
        self.zero_share = nn.Parameter(self._flat("zero_point") / levels.clamp(min=1))
        self.is_weight = self._each([float(q.is_weight) for q in self.members]).bool()
        self.learns_zero = self._each([float(q.learns_offset) for q in self.members]).bool()
        parts = [torch.as_tensor(targets.get(q.name, math.nan), dtype=torch.float32) for q in self.members]
        parts = [part.reshape(-1).expand(size) for part, size in zip(parts, self.sizes, strict=True)]
        self.target = torch.cat([part.to(start.device) for part in parts])
        self.start = start
        self.pruned = start == 0
        per_channel = self._each([float(q.bits.ndim > 0) for q in self.members]).bool()
        free = torch.where(self.is_weight & per_channel, 0.0, LEAST)
        self.least = torch.minimum(torch.where(self.target.isnan(), free, self.target), start)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What an optimizer steps, by name."""
        return {"log2_step": self.log2_step, "log2_range": self.log2_range, "zero_share": self.zero_share}

    @property
    def bits(self) -> Tensor:
        """The widths ``I_alpha``, in bits; shape (steps,)."""
        return without_rounding_error((self.log2_range - self.log2_step).detach(), 1.0)

    @torch.no_grad()
    def gather(self, penalty: Tensor) -> None:
        """Take the gradients of the quantizers, in these coordinates, plus that of the penalty to the widths."""
        to_step, to_bits = self._gradients("log2_step"), self._gradients("bits").add_(penalty)
        levels = torch.exp2(self.bits)
        to_zero = self._gradients("zero_point").where(self.learns_zero, 0.0)
        to_bits += to_zero * self.zero_share * levels * math.log(2)  # the zero point keeps its place in the range
        arrived = self.bits <= self.target + WITHIN  # from there, step and range move as one
        self.log2_step.grad = torch.where(arrived, to_step, to_step - to_bits).masked_fill_(self.pruned, 0.0)
        self.log2_range.grad = torch.where(arrived, to_step, to_bits).masked_fill_(self.pruned, 0.0)
        self.zero_share.grad = to_zero * (levels - 1)

    @torch.no_grad()
    def gather_steps(self) -> None:
        """Take the gradients of the quantizers whose widths are integers now."""
        self.log2_step.grad = self._gradients("log2_step").masked_fill_(self.pruned, 0.0)
        to_zero = self._gradients("zero_point").where(self.learns_zero, 0.0)
        self.zero_share.grad = to_zero * (torch.exp2(self.bits) - 1)

    @torch.no_grad()
    def follow(self) -> None:
        """Have ranges follow the steps, at the widths that the quantizers have."""
        self.log2_range.copy_(self.log2_step + self._flat("bits"))
        self.zero_share.clamp_(0.0, 1.0)

    @torch.no_grad()
    def hold(self, before: Tensor, now: Tensor) -> None:
        """Bring the widths to `now`; prune what is to be pruned.

        Args:
            before: widths that what is allowed has had so far makes of those that the last step has left. Step and
                range take back the difference alike.
            now: what has become of the allowed since. By what it falls the noise grows; how much more should be clipped
                is up to the gradient.
        """
        bits = self.bits
        self.pruned |= (bits < PRUNED) & (self.least == 0.0)
        allowed, wanted = (torch.maximum(b, self.least).masked_fill_(self.pruned, 0.0) for b in (before, now))
        self.log2_step.add_((bits - allowed) / 2)
        self.log2_range.sub_((bits - allowed) / 2)
        self.log2_step.add_((allowed - wanted).clamp_(min=0.0))
        self.zero_share.clamp_(0.0, 1.0)

    @torch.no_grad()
    def write(self, *, widths: bool = True) -> None:
        """Give the quantizers what was learned; without `widths`, theirs are integers already."""
        bits = self.bits
        parts = (t.detach().split(self.sizes) for t in (self.log2_step, bits, self.zero_share * (torch.exp2(bits) - 1)))
        for quantizer, step, width, zero in zip(self.members, *parts, strict=True):
            quantizer.log2_step.copy_(step.view(quantizer.log2_step.shape))
            if widths:
                quantizer.bits.copy_(width.view(quantizer.bits.shape))
            if quantizer.learns_offset:
                quantizer.zero_point.copy_(zero.view(quantizer.zero_point.shape))
            elif widths and not quantizer.is_unsigned:
                quantizer.zero_point.copy_(middle(quantizer.bits))

    def settle(self, widths: Tensor) -> None:
        """Give the quantizers integer widths, at the ranges that were learned."""
        self.write()
        for quantizer, bits in zip(self.members, widths.split(self.sizes), strict=True):
            quantizer.settle(bits.view(quantizer.bits.shape))
        with torch.no_grad():
            self.pruned |= widths == 0
            self.log2_step.copy_(self._flat("log2_step"))
            self.zero_share.copy_(self._flat("zero_point") / (torch.exp2(widths) - 1).clamp(min=1))
        self.follow()

    def state(self) -> list[Tensor]:
        """What is learned, to the bit, and what bounds it."""
        return [*(parameter.detach() for parameter in self.parameters.values()), self.least, self.pruned]

    @torch.no_grad()
    def load(self, state: Sequence[Tensor]) -> None:
        """Restore what `state` gave."""
        for mine, value in zip([*self.parameters.values(), self.least, self.pruned], state, strict=True):
            mine.copy_(value)

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in [*self.parameters.values(), *(p for q in self.members for p in q.parameters())]:
            parameter.grad = None

    def _flat(self, name: str) -> Tensor:
        return torch.cat([getattr(q, name).detach().reshape(-1) for q in self.members])

    def _gradients(self, name: str) -> Tensor:
        parts = [getattr(q, name) for q in self.members]
        return torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in parts])

    def _each(self, values: Sequence[float]) -> Tensor:
        """A value for each quantizer, repeated for its steps."""
        repeats = torch.tensor(self.sizes)
        return torch.tensor(values).repeat_interleave(repeats).to(self.members[0].bits.device)
