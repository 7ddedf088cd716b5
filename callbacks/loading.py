"""Load a quantized Lightning checkpoint without a Trainer."""

from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from typing_extensions import override

from lq.attachment.checkpoint import rebuild
from lq.quantizer.final_widths import warn_if_unfinished

L = TypeVar("L", bound=pl.LightningModule)


def load_from_checkpoint(module_class: type[L], checkpoint_path: str | Path, **kwargs: Any) -> L:
    """``module_class.load_from_checkpoint`` for a checkpoint of a quantized module: its quantizers are rebuilt first.

    Callbacks do not run in Lightning's ``load_from_checkpoint``, so that a plain module finds unknown keys in the
    checkpoint.

    Args:
        module_class: the LightningModule the checkpoint was saved from.
        checkpoint_path: the checkpoint file.
        kwargs: passed on to Lightning: ``map_location``, ``strict``, arguments of the module.

    Raises:
        DataError: if the checkpoint has no quantizers, or they do not fit the module.
    """

    class Rebuilding(module_class):  # type: ignore[valid-type, misc]
        @override
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            rebuild(self, checkpoint["state_dict"])
            super().on_load_checkpoint(checkpoint)

    Rebuilding.__name__, Rebuilding.__qualname__ = module_class.__name__, module_class.__qualname__
    module: L = Rebuilding.load_from_checkpoint(checkpoint_path, **kwargs)
    module.__class__ = module_class
    warn_if_unfinished(module, f"{module_class.__name__}, loaded from a checkpoint,")
    return module
