"""Averages of the module that other callbacks keep (`WeightAveraging` and its kind, stochastic weight averaging)."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lq.attachment.sites import copy_quantizers, quantizers


def averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module that callbacks keep."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [a.module if isinstance(a, AveragedModel) else a for a in found if isinstance(a, nn.Module)]


def give_to_averages(trainer: pl.Trainer, module: nn.Module, *, weights: bool = False) -> None:
    """Give the copies that were made in ``setup`` the grids, and on request the weights, that `module` has got since.

    Ranges that calibration finds and widths that are chosen are no averages of what was before.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            copy_quantizers(module, average)
            if weights:
                copied = average.module if isinstance(average, AveragedModel) else average
                copied.load_state_dict(module.state_dict())


@torch.no_grad()
def keep_averages_exact(trainer: pl.Trainer, module: nn.Module) -> None:
    """Give the copies, before they are used, what is not learned of the grids: averaging has rounded it.

    An average of many threes is not 3 to the last bit, and a width of 2.9999998 no width.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            for mine, theirs in zip(quantizers(module), quantizers(average), strict=True):
                copies = dict(theirs.named_buffers(recurse=False))
                for name, value in mine.named_buffers(recurse=False):
                    if name in copies and value.shape == copies[name].shape:
                        copies[name].copy_(value)
                theirs.refresh()
