r"""Oscillations of quantized weights, and iterative freezing of those that oscillate often.

A weight near the threshold between two levels is pushed over it and back by straight-through gradients. After each step
of an optimizer, with ``q`` the integer of a weight (its level, in steps):

- a weight oscillates if ``q`` changes against the direction of its last change, ``o = 1``, else ``o = 0``;
- its frequency is ``f <- m * o + (1 - m) * f``, its mean integer ``e <- m * q + (1 - m) * e``;
- if ``f`` exceeds a threshold, the weight is frozen: ``q`` is ``round(e)`` (of before this step) from then on.

Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, section 4.3 and algorithm 1,
and its published code. There the quantizer puts a frozen integer in the place of what it rounds; here the float weight
is put on the level, ``w = q * s``, after each step: what is saved, exported and averaged is what was trained, and any
estimator rounds it to that level. As there, the step ``s`` goes on being learned, and frozen weights follow it: its
gradient, ``sum(g * q)`` over them, is added, and their own gradients are taken out (`take_gradients` below).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lq.errors import SpecError
from lq.quantizer.estimators import Estimator
from lq.quantizer.rounding import on_host
from lq.training.quantized_weights import QuantizedWeight

#: A weight with a higher frequency is called oscillating (Nagel et al., table 2).
OSCILLATING = 0.005

# Values that are worked on at a time: of a CPU they stay in its cache, others have more memory and dearer calls.
_BLOCK, _LARGE_BLOCK = 1 << 18, 1 << 24


class OscillationTracker:
    """Counts the oscillations of weights, and freezes them; to be told when an optimizer has stepped.

    Args:
        weights: quantized weights.
        momentum: weight ``m`` of a step in the running means.
        max_bits: channels with more bits are not looked at.
        states: what `state` gave, for those weights that go on from there.

    Raises:
        SpecError: if `momentum` or `max_bits` are out of their ranges.
    """

    def __init__(
        self,
        weights: Iterable[QuantizedWeight],
        momentum: float = 0.01,
        max_bits: int = 4,
        states: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        check_tracking(momentum, max_bits)
        self._blocks = [_Block(block, momentum, max_bits) for block in _in_blocks(weights, max_bits)]
        self.count = sum(block.count for block in self._blocks)
        for block in self._blocks:
            block.load(states or {})

    @torch.no_grad()
    def step(self, threshold: float = math.inf) -> None:
        """Take in the weights after a step of their optimizer, and freeze those whose frequency exceeds `threshold`."""
        for block in self._blocks:
            block.count_changes()
            block.freeze(threshold)
            block.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Put frozen weights on their levels."""
        for block in self._blocks:
            block.hold()

    @torch.no_grad()
    def take_gradients(self, factor: float | Tensor = 1.0) -> None:
        """Before a step: give the gradients of frozen weights to the steps of their grids, which they follow.

        Args:
            factor: gradients to steps over gradients to weights: the loss scale where only the latter are unscaled.
        """
        for block in self._blocks:
            block.take_gradients(factor)

    @torch.no_grad()
    def counts(self) -> list[Tensor]:
        """Numbers of weights that oscillate and that are frozen, of `count`; shape (2,) each, to be added up."""
        return [block.counts() for block in self._blocks]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What is known of each weight, by its name: tensors shaped like it."""
        return {name: state for block in self._blocks for name, state in block.state().items()}


def shares(trackers: Iterable[OscillationTracker]) -> tuple[Tensor | float, Tensor | float]:
    """The shares of weights that oscillate, with a frequency above 0.005, and that are frozen."""
    known = list(trackers)
    counts = [part for tracker in known for part in tracker.counts()]
    if not counts:
        return 0.0, 0.0
    total = torch.stack([part.to(counts[0].device) for part in counts]).sum(0) / sum(each.count for each in known)
    return total[0], total[1]


def check_tracking(momentum: float, max_bits: int) -> None:
    """Raise for values that a tracker cannot have.

    Raises:
        SpecError: naming the value.
    """
    if not 0 < momentum <= 1:
        raise SpecError(f"momentum={momentum} is no weight of a running mean; give a number above 0, at most 1")
    if isinstance(max_bits, bool) or not isinstance(max_bits, int) or not 1 <= max_bits <= 8:
        raise SpecError(f"max_bits={max_bits!r} is not a width of weights that oscillate; give an integer from 1 to 8")


def check_thresholds(start: float, end: float) -> None:
    """Raise for frequencies that freezing cannot go by.

    Raises:
        SpecError: naming the value.
    """
    for name, value in (("start", start), ("end", end)):
        if not 0 < value <= 1:
            raise SpecError(f"{name}={value} is no frequency; give a number above 0, at most 1, at which none freezes")


def looked_at(weight: QuantizedWeight, max_bits: int) -> Tensor | None:
    """Which channels of a weight have widths of 1 to `max_bits` bits that are final, as its ``bits``; None: none."""
    quantizer = weight.quantizer
    if quantizer.final_bits is not None:
        return None
    bits = quantizer.bits.detach()
    chosen = (bits > 0) & (bits <= max_bits)
    return chosen if bool(chosen.any()) else None


def _in_blocks(weights: Iterable[QuantizedWeight], max_bits: int) -> list[list[QuantizedWeight]]:
    """Weights that are worked on together: of one device, and not too many values."""
    blocks: dict[torch.device, list[list[QuantizedWeight]]] = {}
    for weight in weights:
        if looked_at(weight, max_bits) is None:
            continue
        device = weight.parameter.device
        of_device = blocks.setdefault(device, [[]])
        most = _BLOCK if device.type == "cpu" else _LARGE_BLOCK
        if of_device[-1] and sum(other.numel for other in of_device[-1]) + weight.numel > most:
            of_device.append([])
        of_device[-1].append(weight)
    return [block for of_device in blocks.values() for block in of_device]


class _Block:
    """Some weights, and what is known of their values as flat vectors, one weight after the other."""

    def __init__(self, weights: Sequence[QuantizedWeight], momentum: float, max_bits: int) -> None:
        self.weights, self.momentum = weights, momentum
        self.sizes = [weight.numel for weight in weights]
        device, total = weights[0].parameter.device, sum(self.sizes)
        self.direction = torch.zeros(total, dtype=torch.int16, device=device)
        self.frequency = torch.zeros(total, device=device)
        self.frozen = torch.zeros(total, dtype=torch.bool, device=device)
        self.integer = self._integers().to(torch.int16)
        self.mean = self.integer.float()
        self._left_out = self._channels_left_out(max_bits)
        self.count = total if self._left_out is None else int((~self._left_out).sum())
        self._none_frozen = True  # where a number can be read without waiting; else it is not known

    def _parts(self, flat: Tensor) -> Iterable[tuple[QuantizedWeight, Tensor]]:
        return zip(self.weights, flat.split(self.sizes), strict=True)

    def _channels_left_out(self, max_bits: int) -> Tensor | None:
        """1 where a value is of a channel with more bits; None: there are none."""
        left_out = torch.zeros_like(self.frozen)
        for weight, part in self._parts(left_out):
            channels = looked_at(weight, max_bits)
            if channels is not None:
                weight.split(part).copy_(~weight.quantizer.layout.spread(channels, weight.values))
        return left_out if bool(left_out.any()) else None

    def _integers(self) -> Tensor:
        """What the values are rounded to now, in steps, from the level next to zero on grids that have no zero."""
        found = torch.empty(sum(self.sizes), device=self.direction.device)
        for weight, part in self._parts(found):
            bounds = weight.bounds()
            levels = weight.levels(bounds, out=weight.split(part))
            if isinstance(bounds[2], Tensor) or bounds[2]:
                levels.sub_(bounds[2])
        return found

    def count_changes(self) -> None:
        """Take in what the integers are now: directions, frequencies."""
        change = self._integers().sub_(self.integer)
        if self._left_out is not None:
            change.masked_fill_(self._left_out, 0.0)
        if not self._none_frozen:
            change.masked_fill_(self.frozen, 0.0)
        moved = change.to(torch.int16)
        self.integer.add_(moved)
        moved.sign_()
        oscillated = moved.mul(self.direction) < 0
        self.direction.add_(moved, alpha=2).sign_()  # that of now, and where nothing has changed the last one
        self.frequency.mul_(1 - self.momentum).add_(oscillated, alpha=self.momentum)

    def freeze(self, threshold: float) -> None:
        """Freeze weights whose frequency exceeds a threshold, then take in the integers: means."""
        fresh = (self.frequency > threshold).logical_and_(self.frozen.logical_not())
        if not on_host(fresh) or bool(fresh.any()):
            self.frozen.logical_or_(fresh)
            rounded = self.mean.round()
            self.mean.copy_(torch.where(fresh, rounded, self.mean))
            self.integer.copy_(torch.where(fresh, rounded.to(torch.int16), self.integer))
            self._none_frozen = False
        self.mean.lerp_(self.integer.float(), self.momentum)

    def hold(self) -> None:
        """Put frozen weights on their levels."""
        if self._none_frozen:
            return
        for (weight, integer), frozen in zip(self._parts(self.integer), self.frozen.split(self.sizes), strict=True):
            values = weight.split(weight.values)
            levels = weight.split(integer) + weight.bounds()[2]
            values.copy_(torch.where(weight.split(frozen), (levels * weight.step).to(values.dtype), values))

    def take_gradients(self, factor: float | Tensor) -> None:
        """Give the gradients of frozen weights to the steps of their grids."""
        if self._none_frozen:
            return
        for (weight, integer), frozen in zip(self._parts(self.integer), self.frozen.split(self.sizes), strict=True):
            grad = weight.grad
            if grad is None:
                continue
            grad = weight.split(grad)
            _, high, offset = weight.bounds()
            log2_step, mask = weight.quantizer.log2_step, weight.split(frozen)
            if log2_step.grad is not None:
                estimator = weight.quantizer.estimator
                per_step = weight.numel / max(log2_step.numel(), 1)
                scale = weight.step * estimator.gradient_scale(per_step, high) * (math.log(2) * factor)
                along = (grad.float() * (weight.split(integer) + offset)).mul_(mask)
                found = along.sum_to_size(weight.step.shape).mul_(scale).div_(_on_level(estimator))
                log2_step.grad.add_(found.view(log2_step.shape))
            grad.masked_fill_(mask, 0.0)

    def counts(self) -> Tensor:
        """Numbers of weights that oscillate and that are frozen; shape (2,)."""
        oscillating = (self.frequency > OSCILLATING).logical_and_(self.frozen.logical_not())
        return torch.stack([oscillating.sum(), self.frozen.sum()])

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What is known of each weight."""
        return {
            weight.name: {key: part.view(weight.values.shape).clone() for key, part in parts.items()}
            for weight, parts in self._views()
        }

    def load(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from what `state` gave, for weights whose frozen values are where they were held."""
        for weight, parts in self._views():
            state = states.get(weight.name)
            if state is None or any(tuple(state[key].shape) != tuple(weight.values.shape) for key in parts):
                continue
            known = {key: state[key].to(part).flatten() for key, part in parts.items()}
            if bool((known["frozen"] & (known["integer"] != parts["integer"])).any()):
                continue  # something else has changed them since
            now = parts["integer"].clone()
            for key, part in parts.items():
                part.copy_(known[key])
            parts["integer"].copy_(torch.where(known["frozen"], known["integer"], now))
        self._none_frozen = on_host(self.frozen) and not bool(self.frozen.any())

    def _views(self) -> Iterable[tuple[QuantizedWeight, dict[str, Tensor]]]:
        keys = ("integer", "direction", "frequency", "mean", "frozen")
        for row in zip(self.weights, *(getattr(self, key).split(self.sizes) for key in keys), strict=True):
            yield row[0], dict(zip(keys, row[1:], strict=True))


def _on_level(estimator: Estimator) -> float:
    """The factor that an estimator has put on the gradient of a value that is on a level."""
    if not estimator.weighs:
        return 1.0
    grad = torch.ones(1, 1)
    estimator.weigh(grad, torch.zeros(1, 1))
    return float(grad)
