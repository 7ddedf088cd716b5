"""Quantized checkpoints into models that have no quantizers yet.

A quantized model's own ``load_state_dict`` takes quantized and float state dicts alike (a hook on each layer completes
float ones). `load` is for the other direction: it builds the quantizers a checkpoint was saved with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.attach import attach_layer
from lq.errors import DataError
from lq.folding import fold_pair, foldable_pairs
from lq.scheme import LayerPlan
from lq.sites import INPUT, WEIGHT_STATE, input_quantizer, is_attached, weight_quantizer
from lq.spec import QuantSpec

M = TypeVar("M", bound=nn.Module)


def load(source: str | Path | Mapping[str, Any], model: M) -> M:
    """Load a quantized checkpoint into a float or quantized model; quantizers are built from the checkpoint.

    Args:
        source: a state dict, a checkpoint with one under "state_dict" (Lightning's), or the path of a file of either
            kind.
        model: the model it was saved from, as the float code builds it. BatchNorms that were folded are folded here
            too.

    Returns:
        The model, quantized, in place.

    Raises:
        DataError: if there is no quantizer in the checkpoint, or one for a layer the model does not have.

    >>> import lq
    >>> saved = lq.attach(nn.Sequential(nn.Linear(4, 4)), weights=2)
    >>> loaded = load(saved.state_dict(), nn.Sequential(nn.Linear(4, 4)))
    >>> torch.equal(loaded[0].weight, saved[0].weight)
    True
    """
    state_dict = read_state_dict(source)
    rebuild(model, state_dict)
    model.load_state_dict(state_dict)
    return model


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a mapping or a file; nothing but tensors and plain values is unpickled."""
    content = source if isinstance(source, Mapping) else torch.load(source, map_location="cpu", weights_only=True)
    found = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(found, Mapping):
        raise DataError(f"expected a state dict or a checkpoint with one, got a {type(found).__name__}")
    return dict(found)


def rebuild(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Fold and attach as the checkpoint's model was; values are not loaded.

    Raises:
        DataError: if there is no quantizer in `state_dict`, or one for a layer the model does not have.
    """
    weights = _sites(state_dict, WEIGHT_STATE + "bits")
    inputs = _sites(state_dict, INPUT + ".bits")
    if not weights and not inputs:
        raise DataError("the checkpoint has no quantizers: it is a float one; use model.load_state_dict")
    modules: dict[str, nn.Module] = {}
    for name in dict.fromkeys([*weights, *inputs]):
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as error:
            raise DataError(
                f"the checkpoint quantizes a layer {name!r} that {type(model).__name__} does not have; "
                "build the model the checkpoint was saved from"
            ) from error
    if not is_attached(model):
        for pair in foldable_pairs(model):
            if not any(key.startswith(f"{pair.norm}.running_") for key in state_dict):
                fold_pair(model, pair)
    for name, module in modules.items():
        missing_weight = name in weights and weight_quantizer(module) is None
        missing_input = name in inputs and input_quantizer(module) is None
        plan = LayerPlan(
            _spec(weights[name], symmetric=True) if missing_weight else None,
            _spec(inputs[name], symmetric=False) if missing_input else None,
        )
        if missing_weight or missing_input:
            attach_layer(module, name, plan, calibrate=False)
        for quantizer in (weight_quantizer(module) if missing_weight else None, input_quantizer(module)):
            if quantizer is not None and (missing_weight or missing_input):
                quantizer.spec = None  # how it was made is not in the checkpoint


def _sites(state_dict: Mapping[str, Any], ending: str) -> dict[str, Tensor]:
    """Layer name to widths, for the quantizers in `state_dict` whose widths are stored under `ending`."""
    return {
        key[: -len(ending)].removesuffix("."): value
        for key, value in state_dict.items()
        if key == ending or key.endswith("." + ending)
    }


def _spec(bits: Tensor, *, symmetric: bool) -> QuantSpec:
    """A spec of these widths."""
    widths = int(bits) if bits.ndim == 0 else tuple(int(b) for b in bits.tolist())
    return QuantSpec(widths, per_channel=bits.ndim > 0, symmetric=symmetric)
