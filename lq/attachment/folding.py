r"""Fold BatchNorms into the convolutions before them, or after them where that is exact.

The numbers are `lq.attachment.folding_arithmetic`'s. Folding into a convolution after the norm is exact only without
zero padding (the padding would not be shifted). Other norms (EvoNorm, GroupNorm, LayerNorm) depend on the input and
stay.

Which pairs there are, and which of them are sure, says `lq.attachment.foldable`; with an example, pairs are checked by
running it too. Convolutions that are not torch's own class (padding variants, weight standardization) are folded only
if a random input comes out the same.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.foldable import search
from lq.attachment.folded import FoldedInside, around, folded_pairs, remember
from lq.attachment.folding_arithmetic import computes_the_same, folded_parameters
from lq.attachment.folding_check import outputs, reads_alone, same_outputs
from lq.attachment.pairs import CONVOLUTIONS, FoldablePair, UnfoldedNorm, has_act
from lq.attachment.sites import is_attached
from lq.errors import NoEffectWarning, StateError
from lq.structure.forward import Forward

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
    candidates = search(model)
    pairs = [pair for pair in candidates.pairs if convs is None or pair.conv in convs]
    left = [norm for norm in candidates.others if convs is None or norm.conv in convs]
    open_pairs = [pair for pair in pairs if pair not in candidates.doubts or pair in candidates.unrun]
    run = {} if example is None or not open_pairs else reads_alone(model, open_pairs, example, forward)
    sure = []
    for pair in pairs:
        doubt = candidates.doubts.get(pair)
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

    def fold_exact(some: list[FoldablePair]) -> list[FoldablePair]:
        undo = {pair: unfold for pair in some if (unfold := _fold(model, pair))}
        if same_outputs(before, outputs(model, example, forward)):
            return list(undo)
        for pair in reversed(undo):
            undo[pair]()
        if len(undo) <= 1:
            return []
        middle = len(undo) // 2
        return [*fold_exact(list(undo)[:middle]), *fold_exact(list(undo)[middle:])]

    return fold_exact(pairs)


def fold_pair(model: nn.Module, pair: FoldablePair) -> bool:
    """Fold one pair; False, and nothing changed, if the convolution computes something else than its class says."""
    return _fold(model, pair) is not None


def _fold(model: nn.Module, pair: FoldablePair) -> Callable[[], None] | None:
    """Fold one pair and return what undoes it; None, and nothing changed, if that is not exact."""
    conv: Any = model.get_submodule(pair.conv)
    norm: Any = model.get_submodule(pair.norm)
    with torch.no_grad():
        folded = folded_parameters(conv.weight, conv.bias, norm, conv, pair.norm_first)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in folded)  # half precision may overflow
        if not finite or (type(conv) not in CONVOLUTIONS and not computes_the_same(conv, norm, *folded)):
            return None
        old = conv.weight.clone(), None if conv.bias is None else conv.bias.clone()
        conv.weight.copy_(folded[0])
        if conv.bias is None:
            conv.bias = nn.Parameter(folded[1].to(conv.weight))
        else:
            conv.bias.copy_(folded[1])
    left = FoldedNorm(norm.drop, norm.act) if has_act(norm) else nn.Identity()
    _put(model, pair.norm, left.train(norm.training))
    remember(model, pair, FoldedInside(float(norm.eps), norm, old[1] is not None))

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
    parent, local = around(model, pair)
    folds: dict[FoldablePair, FoldedInside] = parent.__dict__["_folded_norms"]
    folded = folds.pop(local)
    conv: Any = model.get_submodule(pair.conv)
    training = model.get_submodule(pair.norm).training
    if not folded.had_bias:
        conv.bias = None
    _put(model, pair.norm, folded.norm.to(conv.weight.device).train(training))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
