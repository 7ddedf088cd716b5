"""What is known of BatchNorms that were folded: by it, a module also folds those of float checkpoints that it loads."""

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from lq.attachment.folding_arithmetic import folded_parameters
from lq.attachment.pairs import FoldablePair, join

_NORM_STATE = ("weight", "bias", "running_mean", "running_var")


@dataclass
class FoldedInside:
    """What a module remembers of a norm that was folded inside of it."""

    eps: float
    norm: nn.Module
    had_bias: bool


def around(model: nn.Module, pair: FoldablePair) -> tuple[nn.Module, FoldablePair]:
    """The module around a pair, and the pair as it is named there."""
    inside = os.path.commonprefix([pair.conv.split("."), pair.norm.split(".")])
    conv, norm = (".".join(name.split(".")[len(inside) :]) for name in (pair.conv, pair.norm))
    return model.get_submodule(".".join(inside)), FoldablePair(conv, norm, pair.norm_first)


def remember(model: nn.Module, pair: FoldablePair, folded: FoldedInside) -> None:
    """Have the module around the pair fold it in any unfolded checkpoint that it loads."""
    parent, local = around(model, pair)
    if "_folded_norms" not in parent.__dict__:
        parent.__dict__["_folded_norms"] = {}
        parent.register_load_state_dict_pre_hook(fold_checkpoint)
    parent.__dict__["_folded_norms"][local] = folded


def folded_pairs(model: nn.Module) -> dict[FoldablePair, nn.Module]:
    """The convolutions and BatchNorms that were folded, with each BatchNorm as it was."""
    return {
        FoldablePair(join(prefix, pair.conv), join(prefix, pair.norm), pair.norm_first): folded.norm
        for prefix, parent in model.named_modules()
        for pair, folded in parent.__dict__.get("_folded_norms", {}).items()
    }


def folded_norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorms that were folded."""
    return [pair.norm for pair in folded_pairs(model)]


def fold_checkpoint(parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict hook: fold the BatchNorms that a checkpoint still has and `parent` has folded."""
    for pair, folded in parent.__dict__.get("_folded_norms", {}).items():
        conv, norm = f"{prefix}{pair.conv}.", f"{prefix}{pair.norm}."
        if f"{norm}running_var" not in state_dict or f"{conv}weight" not in state_dict:
            continue
        stored = SimpleNamespace(eps=folded.eps, **{part: state_dict.pop(norm + part, None) for part in _NORM_STATE})
        state_dict.pop(f"{norm}num_batches_tracked", None)
        weight, bias = state_dict[f"{conv}weight"], state_dict.get(f"{conv}bias")
        module = parent.get_submodule(pair.conv)
        state_dict[f"{conv}weight"], state_dict[f"{conv}bias"] = folded_parameters(
            weight, bias, stored, module, pair.norm_first
        )
