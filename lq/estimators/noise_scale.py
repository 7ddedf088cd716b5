r"""Noise scale: quantization as ``q = f - alpha * r``, ``E|r|^2 = 1``, with ``alpha`` and the width learned.

A uniform grid of step ``s`` has the noise scale ``alpha = s / sqrt(12)``, and ``I_alpha = log2(range / s)`` is the
width in bits: the logarithm of how often the noise fits into what is represented. Both the step and the range are
learned, so that the width is. Gradients:

- to the values, straight through inside the grid;
- to the range, through the lowest and the highest level;
- to the step, the residual ``round(v) - v`` plus the noise of an independent one, ``s * sum(g * r) / sqrt(3)`` with
  ``r = +-1/2`` at random.

Source: Salishev, What We Do (not?) Know About Quantization; Salishev et al., GDNSQ (arXiv 2508.14004) and its published
code. The random sum is drawn at once, as a normal number of the same variance, ``|g|^2 / 12``: one number for a step
instead of one for a value. Its generator is seeded by the training step, so that it leaves no trace in others and a
resumed run draws the same.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lq.estimators.estimator import Estimator, Part


@dataclass(eq=False)
class NoiseScale(Estimator):
    """Steps and zero points are learned; widths too, where something holds them down (`lq.noise_scale`).

    Args:
        widths: whether widths are learned.
        seed: of the random part.
    """

    changes_gradients: ClassVar[bool] = True

    widths: bool = False
    seed: int = 0
    _step: int = field(default=0, init=False, repr=False)
    _drawn: int = field(default=0, init=False, repr=False)

    @property
    def learns(self) -> frozenset[Part]:
        """Step and zero point, and on request the width."""
        return frozenset({"log2_step", "zero_point", "bits"} if self.widths else {"log2_step", "zero_point"})

    def at_step(self, step: int) -> None:
        """Have the noise that is drawn from now on depend on the number of the training step."""
        self._step, self._drawn = step, 0

    def noise(self, size: Tensor) -> Tensor | None:
        """``s * sum(g * r) / sqrt(3)`` over the values that share a step."""
        if torch.compiler.is_compiling():
            return torch.randn_like(size).mul_(size).div_(math.sqrt(12))  # compilers know no generators
        self._drawn += 1
        seed = hash((self.seed, self._step, self._drawn)) & (2**63 - 1)
        generator = torch.Generator(size.device).manual_seed(seed)
        normal = torch.randn(size.shape, generator=generator, device=size.device, dtype=size.dtype)
        return normal.mul_(size).div_(math.sqrt(12))
