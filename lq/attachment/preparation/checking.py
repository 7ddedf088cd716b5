"""Rescale pairs and keep those that leave the model's outputs as they are, by running it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.folding_check import outputs
from lq.attachment.preparation.parts import Rescaling
from lq.attachment.preparation.stored import parameter, write
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward

#: Relative difference of outputs that is rounding.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
_OF_HALF_PRECISION = 0.02


class Check:
    """The outputs of a model on an example, before anything is changed.

    Args:
        model: the model.
        example: a batch.
        forward: how to run the model on it.
        reduce: combines a tensor over ranks, which have to come to one verdict.
    """

    def __init__(self, model: nn.Module, example: Any, forward: Forward | None, reduce: Reduce | None) -> None:
        self.model, self.example, self.forward, self.reduce = model, example, forward, reduce
        self.before = outputs(model, example, forward)

    def excess(self) -> float:
        """The largest difference of an output from what it was, over what rounding may make of it."""
        after = outputs(self.model, self.example, self.forward)
        found = torch.tensor([_excess(old, new) for old, new in zip(self.before, after, strict=False)] or [0.0])
        if [t.shape for t in after] != [t.shape for t in self.before]:
            found = torch.tensor([torch.inf])
        worst = found.max()
        if self.reduce is not None:
            device = next((p.device for p in self.model.parameters()), worst.device)
            worst = self.reduce(worst.to(device), "max")
        return float(worst)

    def kept(self, some: Sequence[Rescaling]) -> list[Rescaling]:
        """Rescale; take back what changes the outputs, and return the rest."""
        undo = {index: done for index, one in enumerate(some) if (done := rescale(self.model, one))}
        if not undo:
            return []
        if self.excess() <= 1:
            return [some[index] for index in undo]
        for index in reversed(undo):
            undo[index]()
        if len(undo) == 1:
            return []
        tried = [some[index] for index in undo]
        middle = len(tried) // 2
        return [*self.kept(tried[:middle]), *self.kept(tried[middle:])]


def _excess(old: Tensor, new: Tensor) -> float:
    limit = _ROUNDING.get(old.dtype, _OF_HALF_PRECISION)
    known = old.isfinite()
    if not bool(known.equal(new.isfinite())):
        return torch.inf
    old, new = old[known].double(), new[known].double()
    size = float(old.norm())
    return float((new - old).norm()) / (limit * size) if size else float((new != old).any())


def rescale(model: nn.Module, one: Rescaling) -> Callable[[], None] | None:
    """Rescale a pair and return what undoes it; None, and nothing changed, if values would overflow."""

    def get(name: str) -> Tensor | None:
        return parameter(model, name)

    with torch.no_grad():
        new = on_device(one, get).parameters(get)
        if not all(bool(value.isfinite().all()) for value in new.values()):
            return None
        old = {name: None if (found := get(name)) is None else found.detach().clone() for name in new}
    write(model, new)

    def undo() -> None:
        write(model, {name: value for name, value in old.items() if value is not None})
        for name in (name for name, value in old.items() if value is None):
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._parameters[last] = None

    return undo


def on_device(one: Rescaling, get: Callable[[str], Tensor | None]) -> Rescaling:
    """A rescaling whose r and t are where the parameters are."""
    weight = get(one.pair.maker.weight)
    device = torch.device("cpu") if weight is None else weight.device
    return Rescaling(one.pair, one.scale.to(device), one.shift.to(device))


def named_weights(model: nn.Module, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Parameters by name, without gradients."""
    return {name: found.detach() for name in names if (found := parameter(model, name)) is not None}
