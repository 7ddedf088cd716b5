"""Schedules of the learning rate: a cosine to zero, and the noise-scale rule; both with a linear warm-up.

- ``cosine``: ``lr * (1 + cos(pi * k / K)) / 2`` at step k of K (MPQCO; Loshchilov and Hutter, SGDR, 2017).
- ``noise_scale``: constant until all widths are at their targets, then times 0.9985 a step (GDNSQ's published code), or
  faster where too few steps are left to come down to 1 %.
"""

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "noise_scale"]

_DECAY = 0.9985
_END = 0.01


def cosine(step: float, total: float) -> float:
    """The factor on the learning rate at a step of a cosine to zero.

    >>> [round(cosine(k, 4), 3) for k in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


def noise_scale(step: int, total: float, met: int | None) -> float:
    """The factor on the learning rate `step` steps into a run of `total`, whose targets were met at step `met`.

    >>> noise_scale(100, 1000, None), round(noise_scale(1000, 1000, 500), 3)
    (1.0, 0.01)
    """
    if met is None or step <= met:
        return 1.0
    left = max(total - met, 1.0)
    decay = _DECAY if math.isinf(left) else min(_DECAY, _END ** (1 / left))
    return float(decay ** (step - met))


def scheduler(optimizer: Optimizer, factor: Callable[[int], float], warmup: int = 0) -> LambdaLR:
    """A schedule of `factor`, from the learning rate that `optimizer` was meant to have at its peak.

    Args:
        optimizer: a user's optimizer, whose own schedules are no longer used.
        factor: of the learning rate at a step.
        warmup: first steps, over which the learning rate rises to what `factor` says.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group.pop("max_lr", group.get("initial_lr", group["lr"]))
        for key in ("min_lr", "max_momentum", "base_momentum"):  # left by a cyclic schedule that is replaced
            group.pop(key, None)
    return LambdaLR(optimizer, lambda step: factor(step) * min((step + 1) / (warmup + 1), 1.0))
