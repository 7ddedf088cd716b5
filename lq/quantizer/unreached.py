"""Quantizers that calibration did not reach: rare experts, early exits, heads that run in training only.

Calibration marks them: their ``log2_step`` is -inf, in checkpoints too, so that "calibrated, but not here" is told from
"not calibrated" (NaN). In training such a quantizer takes the range of the first values that come to it, by the same
rule as calibration, and is like any other from then on. In eval mode nothing of the model changes: values pass in
float, and a warning says so once. So it is with several processes, where each would find a range of its own.
"""

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lq.errors import NoEffectWarning, StateError
from lq.quantizer.histogram import Histogram

if TYPE_CHECKING:
    from lq.quantizer.activation_quantizer import ActivationQuantizer
    from lq.quantizer.quantizer import Quantizer


@torch.no_grad()
def mark_unreached(quantizer: "Quantizer") -> None:
    """Note that calibration was done and did not come to `quantizer`."""
    quantizer.log2_step.fill_(-math.inf)
    quantizer.refresh()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def find_range(quantizer: "ActivationQuantizer", x: Tensor) -> bool:
    """Find the range of a quantizer without one from the first values in training; whether it has one now.

    Raises:
        StateError: if the model was not calibrated.
        DataError: if `x` has NaN or Inf.
    """
    if not quantizer.unreached:
        raise StateError(
            f"{quantizer.name} has no range yet: run lq.calibrate(model, batches) or load a quantized checkpoint"
        )
    if not quantizer.training or not x.numel() or _processes() > 1:
        return False
    histogram = Histogram(quantizer.name, tokens=quantizer.tokens)
    histogram.update(x.detach())
    quantizer.calibrate(histogram)
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]
def passed(quantizer: "ActivationQuantizer", x: Tensor) -> Tensor:
    """`x` in float, said once; learned state stays in the graph, as DDP wants it."""
    if x.numel() and not quantizer.told:
        quantizer.told = True
        warnings.warn(
            f"{quantizer.name} is used, but calibration did not come there: its values pass in float. Calibrate on "
            "batches that go there, train on one process for it to find its range, or leave it out with exclude=",
            NoEffectWarning,
            stacklevel=2,
        )
    for part in (quantizer.log2_step, quantizer.zero_point, quantizer.bits):
        if part.requires_grad and x.is_floating_point():
            x = x + 0.0 * torch.nan_to_num(part, neginf=0.0).to(x.dtype)
    return x


def _processes() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1
