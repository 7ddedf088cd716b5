r"""Which activations stay float while rounding is learned: none, a constant share, or a share that falls to nothing.

With probability p each element of each activation is not quantized, and each element of the unit's input is that of the
float network, ``x^ = where(rand < p, x, x_q)``. The flatness this gives to the rounding is QDrop's observation (Wei et
al., ICLR 2022: p = 0.5 throughout); NWQ lets p fall (annealing mixup; its schedule is not stated, this one is chosen).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.errors import SpecError

#: Probability that an element stays float, after a share of the iterations.
Drop = Callable[[float], float]

# Probabilities are multiples of 1 / 256: a byte of randomness for each element.
_LEVELS = 256


@dataclass(frozen=True)
class Constant:
    """The same probability throughout; 0 is no drop, QDrop has 0.5."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise SpecError(f"drop={self.probability} is no probability; give a number from 0 to 1")

    def __call__(self, done: float) -> float:
        """The probability."""
        return self.probability


@dataclass(frozen=True)
class Annealed:
    """A probability that falls linearly to 0.

    Args:
        start: probability at the beginning.
        until: share of the iterations after which it is 0.
    """

    start: float = 0.5
    until: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1 or not 0 < self.until <= 1:
            raise SpecError(f"Annealed(start={self.start}, until={self.until}): both are shares from 0 to 1")

    def __call__(self, done: float) -> float:
        """The probability after a share `done` of the iterations."""
        return self.start * max(0.0, 1 - done / self.until)


def drop_of(drop: float | str | Drop) -> Drop:
    """The schedule itself, a constant one, or the one called "annealed".

    >>> drop_of("annealed")(0.4)
    0.25
    """
    if isinstance(drop, str):
        if drop != "annealed":
            raise SpecError(f"drop={drop!r} is unknown; use a probability, 'annealed' or a function of progress")
        return Annealed()
    return Constant(float(drop)) if isinstance(drop, (int, float)) else drop


def random_mask(like: Tensor, probability: float, generator: torch.Generator) -> Tensor | None:
    """1.0 with the given probability (to 1/256), else 0.0, shaped like `like`, float32; None: all are 0.

    Made of whole random bytes: a tenth of the time that a random number for each element takes on a CPU.
    """
    threshold = round(probability * _LEVELS)
    if threshold <= 0:
        return None
    if threshold >= _LEVELS:
        return torch.ones_like(like, dtype=torch.float32)
    words = torch.empty((like.numel() + 7) // 8, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    numbers = words.view(torch.int8)[: like.numel()].to(torch.float32)
    return numbers.neg_().add_(threshold - _LEVELS // 2).clamp_(0, 1).view(like.shape)
