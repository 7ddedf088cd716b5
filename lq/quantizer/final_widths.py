"""Widths that training has not brought down yet: a model knows them, saves them, and says so where it is used.

While widths come down one by one, or are learned, a quantizer has more bits than were asked for. It then also carries
the width it will have in the end, ``final_bits``, and so does its state under that key; a finished model has no such
key. What is saved in the meantime can be told apart from what was asked for, wherever it is loaded or exported.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Name of the widths in the end in a state dict.
FINAL = "final_bits"
# Widths that differ by less are the same.
_SAME = 1e-3


class FinalWidths(nn.Module):
    """The part of a quantizer that knows which widths it will have when training is over."""

    bits: Tensor
    name: str
    #: Widths in the end, shaped like ``bits``, on the CPU; None: those it has.
    final_bits: Tensor | None = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.final_bits is not None:
            destination[prefix + FINAL] = self.final_bits

    def _load_from_state_dict(  # its arguments are torch's
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + FINAL
        unknown: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unknown, error_msgs)
        unexpected_keys.extend(found for found in unknown if found != key)
        if key not in state_dict:
            self.final_bits = None
        elif state_dict[key].shape == self.bits.shape:
            self.final_bits = state_dict[key].detach().clone().cpu()
        else:
            error_msgs.append(f"{key} has shape {tuple(state_dict[key].shape)}, expected {tuple(self.bits.shape)}")


@torch.no_grad()
def set_final_widths(model: nn.Module, widths: Mapping[str, Tensor]) -> None:
    """Note the widths that quantizers will have in the end, by name; those of them that have these are finished."""
    for module in model.modules():
        if isinstance(module, FinalWidths):
            final = widths.get(module.name)
            bits = None if final is None else final.detach().cpu().expand(module.bits.shape).clone()
            module.final_bits = None if bits is None or _same(module.bits, bits) else bits


def unfinished_widths(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Mean width now and in the end of each quantizer that training has not finished, by name."""
    widths = {}
    for module in model.modules():
        if isinstance(module, FinalWidths) and module.final_bits is not None:
            final = module.final_bits
            if not _same(module.bits, final):
                widths[module.name] = (float(module.bits.detach().mean()), float(final.mean()))
    return widths


def warn_if_unfinished(model: nn.Module, what: str) -> None:
    """Warn if widths are not those that were asked for, because training was not over.

    Args:
        model: a model with or without quantizers.
        what: it is, and is done with it, at the start of the message: "the checkpoint that is loaded".
    """
    widths = unfinished_widths(model)
    if not widths:
        return
    shown = [f"{name}: {now:.3g} bits instead of {final:.3g}" for name, (now, final) in list(widths.items())[:3]]
    more = f", and {len(widths) - 3} more" if len(widths) > 3 else ""
    warnings.warn(
        f"{what} has more bits than were asked for: training had not brought the widths down yet ({', '.join(shown)}"
        f"{more}); use a checkpoint from after that, or go on training from this one with trainer.fit(ckpt_path=...)",
        UserWarning,
        stacklevel=3,
    )


def _same(bits: Tensor, final: Tensor) -> bool:
    return bool(((bits.detach().cpu() - final).abs() < _SAME).all())
