"""Quantizers inside a module's forward: at operands and results of the functions it calls itself.

`attach` gives such a module a submodule ``call_quantizers``, whose children are named by call and operand
(``matmul_0_left``), and a ``forward`` that runs the original one while a `TorchFunctionMode` looks at each function.
Calls in modules below do not count: every module below notes that it runs by a pair of hooks. Nothing of the module's
code is read or changed, so that control flow is no obstacle; calls that are not reached keep their quantizers unused.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lq.attachment.running import CALLS, RUNNING, CallQuantizers, Watch, enter, leave, quantized_forward
from lq.quantizer.quantizer import Quantizer


@contextmanager
def watched_calls(watch: Watch) -> Iterator[None]:
    """Have `watch` run the products that have quantizers, in this thread.

    It is given the module, the names of the calls (two for fused attention, whose result is that of the second), and
    what computes the result, as often as it is called; it returns what flows on.
    """
    before, RUNNING.watch = RUNNING.watch, watch
    try:
        yield
    finally:
        RUNNING.watch = before


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[dict[str, float]]:
    """Multiply-accumulates of the calls that have quantizers, by module and call; filled when the context ends."""
    macs: dict[str, float] = {}
    RUNNING.work.append({})
    try:
        yield macs
    finally:
        counted = RUNNING.work.pop()
        names = {id(m._modules[CALLS]._modules): n for n, m in model.named_modules() if call_quantizers(m)}
        for (key, call), count in counted.items():
            if key in names:
                macs[f"{names[key]}.{call}".lstrip(".")] = count


def call_quantizers(module: nn.Module) -> dict[str, nn.Module]:
    """The quantizers of a module's calls, by call and operand."""
    calls = module._modules.get(CALLS)
    return dict(calls._modules) if isinstance(calls, CallQuantizers) else {}


def add_call_quantizer(module: nn.Module, slot: str, quantizer: nn.Module) -> None:
    """Put a quantizer at an operand or result of a call of `module`."""
    if not isinstance(module._modules.get(CALLS), CallQuantizers):
        below = [m for m in module.modules() if m is not module and not isinstance(m, Quantizer)]
        module.add_module(CALLS, CallQuantizers().train(module.training))
        own = module.__dict__.get("forward")
        module.forward = partial(quantized_forward, module, own)
        module.forward.__signature__ = inspect.signature(own or partial(type(module).forward, module))  # type: ignore[attr-defined]
        module._replicate_for_data_parallel = partial(_replica, module)  # type: ignore[method-assign]
        for part in below:
            if not isinstance(part, (torch.jit.ScriptModule, CallQuantizers)) and enter not in _hooked(part):
                part.register_forward_pre_hook(enter, prepend=True)  # before and after the part's own quantizers
                part.register_forward_hook(leave, always_call=True)
    module.get_submodule(CALLS).add_module(slot, quantizer)


def remove_call_quantizers(model: nn.Module) -> None:
    """Take all call quantizers off a model, and every trace of them."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(CALLS), CallQuantizers):
            delattr(module, CALLS)
            del module._replicate_for_data_parallel
            original = module.__dict__.pop("forward").args[1]
            if original is not None:
                module.forward = original
        for hooks, function in ((module._forward_pre_hooks, enter), (module._forward_hooks, leave)):
            for key in [key for key, hook in hooks.items() if hook is function]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _replica(module: nn.Module) -> nn.Module:
    """A copy for another device, as `nn.DataParallel` makes them: it runs its own forward, with its own quantizers."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    replica.forward = partial(quantized_forward, replica, module.forward.args[1])  # type: ignore[attr-defined]
    return replica


def _hooked(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())
