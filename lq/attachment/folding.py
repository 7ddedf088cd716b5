r"""Fold BatchNorms into the convolutions before them, or after them where that is exact.

With ``g = gamma / sqrt(var + eps)`` and ``t = beta - mean * g``, computed in float64: a convolution before the norm
becomes ``w' = w * g``, ``b' = b * g + t``; one after it ``w' = w * g`` along its input channels and
``b' = b + sum(w * t)``, which is exact only without zero padding (the padding would not be shifted). Other norms
(EvoNorm, GroupNorm, LayerNorm) depend on the input and stay.

Which pairs there are, and which of them are sure, says `lq.attachment.foldable`; with an example, pairs are checked by
running it too. Convolutions that are not torch's own class (padding variants, weight standardization) are folded only
if a random input comes out the same.
"""

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.foldable import CONVOLUTIONS, FoldablePair, UnfoldedNorm, has_act, search
from lq.attachment.folding_check import outputs, reads_alone, same_outputs
from lq.attachment.sites import is_attached
from lq.errors import NoEffectWarning, StateError
from lq.structure.channels import ChannelLayout
from lq.structure.forward import Forward

_NORM_STATE = ("weight", "bias", "running_mean", "running_var")
#: At most so many norms are named in a warning.
_NAMED = 3


@dataclass(frozen=True)
class Folding:
    """What was folded, and which BatchNorms beside a convolution were left and why."""

    pairs: list[FoldablePair]
    left: list[UnfoldedNorm]

    def warning(self) -> str:
        """What to tell somebody who can do something about it; empty if there is nothing to do."""
        return _sentence([norm for norm in self.left if norm.advice])


@dataclass
class _Folded:
    """What a module remembers of a norm that was folded inside of it."""

    eps: float
    norm: nn.Module
    had_bias: bool


class FoldedNorm(nn.Module):
    """What is left of a `BatchNormAct2d` after folding: its drop and its activation, under their old names."""

    def __init__(self, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply drop and activation."""
        return self.act(self.drop(x))  # type: ignore[no-any-return]


def fold_batchnorm(model: nn.Module, example: Any = None, forward: Forward | None = None) -> list[FoldablePair]:
    """Fold every BatchNorm next to a convolution into it, in place; the norm's running statistics are used.

    Norms after a convolution are folded, and norms before one that does not pad; frozen and synchronized ones too. Only
    pairs are folded that are sure whatever path through the code is run (see `lq.attachment.foldable`). What is left
    beside a convolution and why says `left_unfolded`.

    A float checkpoint of the unfolded model still loads: its BatchNorms are folded on the way in.

    Args:
        model: a model without quantizers.
        example: a batch to check by running, in eval mode: pairs that depend on arguments are folded if the example
            has them, and a pair whose folding would change the outputs is left.
        forward: how to run the model on it, as in `lq.calibrate`.

    Returns:
        The folded pairs; BatchNorms that are in no pair stay as they are.

    Raises:
        StateError: if the model has quantizers already, whose ranges would not fit the folded weights.
        DataError: if the model does not take the example.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> fold_batchnorm(model)
    [FoldablePair(conv='0', norm='1')]
    """
    folding = fold(model, example, forward)
    if text := folding.warning():
        warnings.warn(text, NoEffectWarning, stacklevel=2)
    return folding.pairs


def fold(
    model: nn.Module, example: Any = None, forward: Forward | None = None, *, convs: Collection[str] | None = None
) -> Folding:
    """As `fold_batchnorm`, of these convolutions only, and without a warning."""
    _require_float(model)
    folded = []
    sure, left = _sure(model, example, forward, convs)
    for pair in _unchanged(model, sure, example, forward):
        if example is not None or _fold(model, pair):
            folded.append(pair)
    known = {pair.norm for pair in folded}
    computed = "folding it would change what the two compute"
    left += [UnfoldedNorm(pair.norm, pair.conv, computed) for pair in sure if pair.norm not in known]
    return Folding(folded, left)


def left_unfolded(model: nn.Module, example: Any = None, forward: Forward | None = None) -> list[UnfoldedNorm]:
    """BatchNorms beside a convolution that `fold_batchnorm` leaves, or has left, and why; nothing is changed.

    Norms that follow no convolution are not among them.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> handle = model[0].register_forward_hook(print)
    >>> print(left_unfolded(model)[0])
    1 behind 0: 0 has a hook, which folding would take the values from (remove the hook first)
    """
    _require_float(model)
    return _sure(model, example, forward, None)[1]


def _require_float(model: nn.Module) -> None:
    if is_attached(model):
        raise StateError(
            "BatchNorm cannot be folded into weights that have quantizers: lq.detach(model), lq.fold_batchnorm(model), "
            "then lq.attach(model, ...) again"
        )


def _sentence(left: list[UnfoldedNorm]) -> str:
    if not left:
        return ""
    few = "; ".join(map(str, left[:_NAMED])) + ("; ..." if len(left) > _NAMED else "")
    return f"{len(left)} BatchNorm{'s' if len(left) > 1 else ''} stayed unfolded: {few}"


def _sure(
    model: nn.Module, example: Any, forward: Forward | None, convs: Collection[str] | None
) -> tuple[list[FoldablePair], list[UnfoldedNorm]]:
    """The pairs that are sure, of the code and of an example; and the norms that are not, and why."""
    found = search(model)
    pairs = [pair for pair in found.pairs if convs is None or pair.conv in convs]
    left = [norm for norm in found.others if convs is None or norm.conv in convs]
    asked = [pair for pair in pairs if pair not in found.doubts or pair in found.unrun]
    run = {} if example is None or not asked else reads_alone(model, asked, example, forward)
    sure = []
    for pair in pairs:
        doubt = found.doubts.get(pair)
        if pair in run:
            doubt = UnfoldedNorm(pair.norm, pair.conv, run[pair]) if run[pair] else None
        if doubt is None:
            sure.append(pair)
        else:
            left.append(doubt)
    return sure, left


def _unchanged(
    model: nn.Module, pairs: list[FoldablePair], example: Any, forward: Forward | None
) -> list[FoldablePair]:
    """Fold pairs and undo those that change what the model makes of the example; without one, all, and not folded."""
    if example is None or not pairs:
        return pairs
    before = outputs(model, example, forward)

    def kept(some: list[FoldablePair]) -> list[FoldablePair]:
        undo = {pair: done for pair in some if (done := _fold(model, pair))}
        if same_outputs(before, outputs(model, example, forward)):
            return list(undo)
        for pair in reversed(undo):
            undo[pair]()
        if len(undo) <= 1:
            return []
        middle = len(undo) // 2
        return [*kept(list(undo)[:middle]), *kept(list(undo)[middle:])]

    return kept(pairs)


def fold_pair(model: nn.Module, pair: FoldablePair) -> bool:
    """Fold one pair; False, and nothing changed, if the convolution computes something else than its class says."""
    return _fold(model, pair) is not None


def _fold(model: nn.Module, pair: FoldablePair) -> Callable[[], None] | None:
    """Fold one pair and return what undoes it; None, and nothing changed, if that is not exact."""
    conv: Any = model.get_submodule(pair.conv)
    norm: Any = model.get_submodule(pair.norm)
    with torch.no_grad():
        folded = _folded(conv.weight, conv.bias, norm, conv, pair.norm_first)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in folded)  # half precision may overflow
        if not finite or (type(conv) not in CONVOLUTIONS and not _same(conv, norm, *folded)):
            return None
        old = conv.weight.clone(), None if conv.bias is None else conv.bias.clone()
        conv.weight.copy_(folded[0])
        if conv.bias is None:
            conv.bias = nn.Parameter(folded[1].to(conv.weight))
        else:
            conv.bias.copy_(folded[1])
    left = FoldedNorm(norm.drop, norm.act) if has_act(norm) else nn.Identity()
    _put(model, pair.norm, left.train(norm.training))
    _remember(model, pair, _Folded(float(norm.eps), norm, old[1] is not None))

    @torch.no_grad()
    def undo() -> None:
        _unfold(model, pair)
        conv.weight.copy_(old[0])
        if old[1] is not None:
            conv.bias.copy_(old[1])

    return undo


def unfold_for(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Put back the folded BatchNorms that a checkpoint has, which is to be loaded next: weights stay folded."""
    for pair in folded_pairs(model):
        if f"{pair.norm}.running_mean" in state_dict:
            _unfold(model, pair)


def _unfold(model: nn.Module, pair: FoldablePair) -> None:
    """Put the norm of a pair back; the convolution's values are not restored."""
    parent, local = _around(model, pair)
    folds: dict[FoldablePair, _Folded] = parent.__dict__["_folded_norms"]
    folded = folds.pop(local)
    conv: Any = model.get_submodule(pair.conv)
    training = model.get_submodule(pair.norm).training
    if not folded.had_bias:
        conv.bias = None
    _put(model, pair.norm, folded.norm.to(conv.weight.device).train(training))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _folded(weight: Tensor, bias: Tensor | None, norm: Any, conv: Any, norm_first: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its norm; computed in float64."""
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    wide = weight.double()
    if norm_first:
        per_group = (conv.groups, 1, -1, *[1] * (weight.ndim - 2))
        grouped = wide.unflatten(0, (conv.groups, -1))
        scaled = (grouped * gain.view(per_group)).flatten(0, 1)
        added = (grouped * shift.view(per_group)).flatten(0, 1).flatten(1).sum(1)
        total = added if bias is None else added + bias.double()
    else:
        layout = ChannelLayout.of(conv, weight)
        scaled = layout.join(layout.split(wide) * layout.spread(gain, weight))
        total = shift if bias is None else bias.double() * gain + shift
    return scaled.to(weight.dtype), total.to(weight.dtype)


def _same(conv: Any, norm: Any, weight: Tensor, bias: Tensor) -> bool:
    """Whether the convolution with folded parameters does what convolution and norm do, on a random input."""
    size = [2 * (kernel - 1) * dilation + 3 for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, *size, generator=generator).to(conv.weight)
    training = norm.training
    norm.eval()
    try:
        expected = nn.functional.batch_norm(
            conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        got = torch.func.functional_call(conv, {"weight": weight} | ({} if conv.bias is None else {"bias": bias}), (x,))
        if conv.bias is None:
            got = got + bias.view(-1, *[1] * len(size))
        return torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    except RuntimeError:
        return False
    finally:
        norm.train(training)


# --- float checkpoints of the unfolded model ----------------------------------------------------------------------


def _around(model: nn.Module, pair: FoldablePair) -> tuple[nn.Module, FoldablePair]:
    """The module around a pair, and the pair as it is named there."""
    inside = os.path.commonprefix([pair.conv.split("."), pair.norm.split(".")])
    conv, norm = (".".join(name.split(".")[len(inside) :]) for name in (pair.conv, pair.norm))
    return model.get_submodule(".".join(inside)), FoldablePair(conv, norm, pair.norm_first)


def _remember(model: nn.Module, pair: FoldablePair, folded: _Folded) -> None:
    """Have the module around the pair fold it in any unfolded checkpoint that it loads."""
    parent, local = _around(model, pair)
    if "_folded_norms" not in parent.__dict__:
        parent.__dict__["_folded_norms"] = {}
        parent.register_load_state_dict_pre_hook(fold_checkpoint)
    parent.__dict__["_folded_norms"][local] = folded


def folded_pairs(model: nn.Module) -> dict[FoldablePair, nn.Module]:
    """The convolutions and BatchNorms that were folded, with each BatchNorm as it was."""
    return {
        FoldablePair(_join(prefix, pair.conv), _join(prefix, pair.norm), pair.norm_first): folded.norm
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
        state_dict[f"{conv}weight"], state_dict[f"{conv}bias"] = _folded(weight, bias, stored, module, pair.norm_first)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
