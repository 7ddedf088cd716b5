"""The work of a layer: multiply-accumulates (MACs) per sample, counted while the model runs."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lq.interception import counted_calls
from lq.sites import float_weight, quantized_layers

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
            given = args[0] if args else kwargs.get("input")
            macs[name] = macs.get(name, 0.0) + _macs(module, given, output) / max(samples, 1)

        handles.append(module.register_forward_hook(count, with_kwargs=True))
    try:
        with counted_calls(model) as calls:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return macs | {name: count / max(samples, 1) for name, count in calls.items()}


def batch_size(batch: Any) -> int:
    """Length of the first tensor with a dimension in a batch; 1 if there is none.

    >>> import torch
    >>> batch_size([{"image": torch.zeros(7, 3)}])
    7
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, (Tensor, Mapping, tuple, list)):
            return batch_size(part)
    return 1


def _macs(module: nn.Module, given: Any, output: Any) -> float:
    """MACs of one call: each weight is used once per output position (input position if transposed)."""
    weight = float_weight(module)
    if weight is None or not isinstance(output, Tensor) or isinstance(module, nn.Embedding):
        return 0.0
    if isinstance(module, _CONV):
        positions = output.numel() / module.out_channels
    elif isinstance(module, _TRANSPOSED) and isinstance(given, Tensor):
        positions = given.numel() / module.in_channels
    else:
        positions = output.numel() / weight.shape[0]
    return float(positions * weight.numel())
