"""What a module needs before quantizers can be attached: values, shapes, and the folding that a checkpoint has."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lq.attachment.checkpoint import folds_otherwise, rebuild
from lq.attachment.preparation.stored import is_marker, match
from lq.attachment.saved_plan import planned_by
from lq.attachment.sites import is_attached
from lq.errors import DataError, StateError
from lq.structure.forward import Forward, eval_mode, run


def require_values(module: nn.Module) -> None:
    """Raise if parameters are on the meta device: ranges are found from values."""
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if names:

        def stay() -> nn.Module:
            del module.__dict__["cpu"]
            return module

        module.__dict__["cpu"] = stay  # a Trainer moves the module there after an error, and fails: that hides this one
        raise StateError(
            f"{type(module).__name__} has {len(names)} parameters without values, on the meta device, such as "
            f"{names[0]}; Quantize finds ranges from values: give them before fit (module.to_empty(device='cpu') and "
            "load_state_dict), or build the layers in configure_model"
        )


def is_uninitialised(module: nn.Module) -> bool:
    """Whether layers wait for their first input to know their shapes."""
    return any(is_lazy(tensor) for tensor in [*module.parameters(), *module.buffers()])


def initialise_lazy_layers(module: nn.Module, example: tuple[Any, Forward] | None) -> None:
    """Run the module once, in eval mode, so that lazy layers get their shapes.

    Args:
        module: a module with lazy layers.
        example: a batch and how to run the module on it; None if there is none.

    Raises:
        DataError: if there is no example, the module does not take it, or it leaves a layer as it is.
    """
    failed = ""
    if example is not None:
        try:
            with eval_mode(module), torch.no_grad():
                run(module, *example)
        except DataError as error:
            failed = f" ({error})"
    tensors = [*module.named_parameters(), *module.named_buffers()]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name, tensor in tensors if is_lazy(tensor)))
    if names:
        raise DataError(
            f"{type(module).__name__} has lazy layers that Quantize could not give their shapes: "
            f"{', '.join(names[:3])}{failed}; set example_input_array, or run the module on a batch before fit"
        )


def rebuild_from_checkpoint(module: pl.LightningModule, check: Callable[[pl.LightningModule, bool], bool]) -> None:
    """Have the module build what a quantized checkpoint has and it has not, when it is restored.

    Those are quantizers, if it has none or those of its layers' classes, and BatchNorms that are folded or not.

    Args:
        module: the module that will be restored.
        check: called before a quantized checkpoint is restored, with whether it has other BatchNorms folded; returns
            whether the checkpoint knows better which quantizers there are.
    """
    if hasattr(module.on_load_checkpoint, "rebuilds"):
        return
    restore = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint.get("state_dict", {})
        if any(map(is_marker, state_dict)):
            match(module, state_dict)
        if planned_by(state_dict):
            otherwise = folds_otherwise(module, state_dict)
            guessed = check(module, otherwise)
            if otherwise or guessed or not is_attached(module):
                rebuild(module, state_dict)
        restore(checkpoint)

    on_load_checkpoint.rebuilds = vars(module).get("on_load_checkpoint")  # type: ignore[attr-defined]
    module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]


def leave_checkpoints_alone(module: pl.LightningModule) -> None:
    """Undo `rebuild_from_checkpoint`."""
    if hasattr(module.on_load_checkpoint, "rebuilds"):
        before = module.__dict__.pop("on_load_checkpoint").rebuilds
        if before is not None:
            module.on_load_checkpoint = before  # type: ignore[method-assign]
