"""Which arithmetic rounds a tensor: the fused kernels of a GPU (`lq.quantizer.triton_kernels`), or operations of torch.

Kernels are taken for plain CUDA tensors of float32, float16 and bfloat16 whose values lie together in memory. All else
falls back to the operations, which are the reference: other dtypes, strided views, channels that do not lie together
(groups of transposed convolutions), estimators that weigh gradients by sums over them, fake tensors, transforms of
``torch.func``, gradients of gradients. Under ``torch.compile`` inductor fuses the operations, with their neighbours
too, which a kernel of our own in the graph would prevent.

Before the first use on a GPU the kernels are compiled and compared with the operations on a few values; where they
cannot be compiled (no C compiler) or differ, a warning says so, and the operations are used. ``LQ_TRITON=0`` in the
environment switches them off.
"""

import os
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lq.errors import NoEffectWarning
from lq.quantizer.gradients import Sums
from lq.quantizer.gradients import gradients as reference_gradients
from lq.quantizer.places import Places
from lq.quantizer.rounding import Bound, mixed, round_to_grid

if TYPE_CHECKING:
    from types import ModuleType

#: With this environment variable set to 0, kernels are not used.
SWITCH = "LQ_TRITON"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (7, 5)  # compute capability that the kernels are compiled for in the tests
_LARGEST = (1 << 31) - (1 << 20)  # positions are 32-bit integers
_PROVEN: dict[torch.device, bool] = {}


def rounded(x: Tensor, step: Tensor, low: Bound, high: Bound, offset: Bound, kept: Tensor | None) -> Tensor:
    """`x` rounded to its grid, in its own dtype; arguments as for `lq.quantizer.functional.fake_quantize`."""
    places = fused_places(x, step, (low, high, offset), kept)
    if places is None:
        values = x.float()
        return mixed(round_to_grid(values, step, low, high, offset), values, kept).to(x.dtype)
    return _kernels().round_values(x, step.reshape(-1), low, high, offset, kept, places)  # type: ignore[no-any-return]


def fused_gradients(grad: Tensor, x: Tensor, offset: Bound, sums: Sums, kept: Tensor | None) -> Tensor | None:
    """The gradient to `x`, as `lq.quantizer.gradients.gradients` gives it, of one pass; fills `sums` if any are wanted.

    None: the kernels do not know this case.
    """
    rule = sums.rule
    weight = rule.error_weight if rule is not None and rule.weighs else None
    places = fused_places(x, sums.step, (sums.low, sums.high, offset), kept)
    if places is None or (rule is not None and rule.weighs and weight is None):
        return None
    grad_x, found = _kernels().gradients(
        _like(grad, x),
        x,
        sums.step.reshape(-1),
        (sums.low, sums.high, offset),
        kept,
        places,
        sums=sums.wanted,
        to_bounds=sums.to_bounds,
        squares=rule is not None,
        weight=weight,
    )
    if sums.wanted:
        sums.take(found.unbind(), sums.step.shape)
    return grad_x  # type: ignore[no-any-return]


def fused_places(x: Tensor, step: Tensor, bounds: tuple[Bound, Bound, Bound], kept: Tensor | None) -> Places | None:
    """Where values lie that share a step, if kernels can round them; None: they cannot."""
    if not on_gpu(x) or x.dtype not in _DTYPES or not 0 < x.numel() <= _LARGEST or not proven(x.device):
        return None
    if kept is not None and kept.stride() != x.stride():
        return None
    if any(isinstance(b, Tensor) and b.numel() != 1 and b.shape != step.shape for b in bounds):
        return None
    return Places.of(x, step)


def on_gpu(x: Tensor) -> bool:
    """Whether `x` has values on a GPU of NVIDIA, and kernels may be launched for it now."""
    if not x.is_cuda or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return torch.version.hip is None


def proven(device: torch.device) -> bool:
    """Whether kernels give on `device` what the operations give; found once."""
    if device not in _PROVEN:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # compiling and comparing cannot be captured
        _PROVEN[device] = False  # for the comparison itself, and if it raises
        _PROVEN[device] = os.environ.get(SWITCH) != "0" and _new_enough(device) and _compared(device)
    return _PROVEN[device]


def _new_enough(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST


def _compared(device: torch.device) -> bool:
    """Compile the kernels, and compare them with the operations."""
    try:
        kernels = _kernels()
    except ImportError:
        return False  # triton is not there: CPU wheels of torch come without
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 300, generator=generator) * 3).to(device)
    grad = torch.randn(8, 300, generator=generator).to(device)
    step = torch.rand(8, 1, generator=generator).add_(0.5).to(device)
    places = Places(1, 8, 300)
    try:
        y = kernels.round_values(x, step.view(-1), -4.0, 3.0, 0.0, None, places)
        options = {"sums": True, "to_bounds": True, "squares": False, "weight": None}
        grad_x, found = kernels.gradients(grad, x, step.view(-1), (-4.0, 3.0, 0.0), None, places, **options)
        sums = Sums(step, -4.0, 3.0, True, None)
        same = torch.equal(y, round_to_grid(x, step, -4.0, 3.0))
        same &= torch.equal(grad_x, reference_gradients(grad, x, 0.0, sums, None))
        expected = torch.stack([sums.product, sums.total, sums.outside]).view_as(found)
        same &= torch.allclose(found, expected, rtol=1e-4, atol=1e-2)
        trouble = "they give other values than operations of torch"
    except Exception as error:  # noqa: BLE001 - of compilers, drivers and launchers, with no common class
        same, trouble = False, f"{type(error).__name__}: {error}"
    if not same:
        warnings.warn(
            f"the fused kernels of lq are not used on {device}: {trouble}. Quantizers work as before, with more passes "
            f"over their values; {SWITCH}=0 in the environment says nothing",
            NoEffectWarning,
            stacklevel=2,
        )
    return same


def _kernels() -> "ModuleType":
    from lq.quantizer import triton_kernels

    return triton_kernels


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` laid out in memory as `x` is."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)
