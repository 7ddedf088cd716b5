"""The work of a layer: multiply-accumulates (MACs) per sample, counted while the model runs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lq.attachment.interception import counted_calls
from lq.attachment.sites import float_weight, quantized_layers
from lq.structure.samples import batch_size

__all__ = ["batch_size", "count_macs"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_macs(model: nn.Module, forward: Callable[[], Any], samples: int) -> dict[str, float]:
    """MACs per sample of the quantized layers and calls that `forward`, a run on `samples` samples, reaches."""
    macs: dict[str, float] = {}
    handles = []
    for name, module in quantized_layers(model):

        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
        ) -> None:
            operand = args[0] if args else kwargs.get("input")
            macs[name] = macs.get(name, 0.0) + _macs(module, operand, output) / max(samples, 1)

        handles.append(module.register_forward_hook(count, with_kwargs=True))
    try:
        with counted_calls(model) as calls:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return macs | {name: count / max(samples, 1) for name, count in calls.items()}


def _macs(module: nn.Module, operand: Any, output: Any) -> float:
    """MACs of one call: each weight is used once per output position (input position if transposed)."""
    weight = float_weight(module)
    if weight is None or not isinstance(output, Tensor) or isinstance(module, nn.Embedding):
        return 0.0
    if isinstance(module, _CONV):
        positions = output.numel() / module.out_channels
    elif isinstance(module, _TRANSPOSED) and isinstance(operand, Tensor):
        positions = operand.numel() / module.in_channels
    else:
        positions = output.numel() / weight.shape[0]
    return float(positions * weight.numel())
