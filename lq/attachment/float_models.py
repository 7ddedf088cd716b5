"""The float model that a quantized one was: a copy without quantizers, or the model itself for a while."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from lq.attachment.attach import detach
from lq.attachment.sites import is_attached, quantizers
from lq.structure.forward import eval_mode

M = TypeVar("M", bound=nn.Module)


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` without quantizers, in eval mode, without gradients."""
    teacher = copy_model(model)
    if is_attached(teacher):
        detach(teacher)
    return teacher.eval().requires_grad_(False)


@contextmanager
def float_model(model: nn.Module) -> Iterator[None]:
    """The float model: no quantizer rounds, nothing trains, no fused kernel hides a layer; undone afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    taps = [(q, q.tap) for q in quantizers(model)]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for quantizer, _ in taps:
            quantizer.tap = _pass
        with _NO_FAST_PATH, eval_mode(model), torch.autocast(_device_type(model), enabled=False):
            yield
    finally:
        for quantizer, tap in taps:
            quantizer.tap = tap
        for parameter in trained:
            parameter.requires_grad_(True)


class _NoFastPath:
    """No fused kernel of torch's attention modules, in any thread, until the last that needs it so is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.backends.mha.set_fastpath_enabled(self._before)


_NO_FAST_PATH = _NoFastPath()


def _pass(x: Tensor) -> Tensor:
    return x


def _device_type(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def copy_model(model: M) -> M:
    """A deep copy, also of a model that holds computed tensors, which torch does not copy.

    Weight and spectral norms that are hooks keep the weight they have computed as an attribute of the layer. The copy
    has its values, and computes it anew in its next forward.
    """
    computed = (
        value
        for module in model.modules()
        for value in [*vars(module).values(), *module._buffers.values()]
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
