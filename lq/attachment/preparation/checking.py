"""Rescale pairs and keep those that leave the model's outputs as they are, by running it.

What the layers that read a rescaled tensor give is looked at too (at most 65 536 values of each): a branch of a
residual network may be scaled by 1e-6 before it reaches an output.

What counts as rounding: 1e-5 of the norm of an output in float32; where a model makes more of rounding errors, eight
times what it makes of an input that is changed by one part in 2^22, at most 1e-3.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lq.attachment.folding_check import outputs
from lq.attachment.preparation.parts import Rescaling
from lq.attachment.preparation.stored import parameter, write
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward

#: Relative difference of outputs that is rounding: at least, and at most.
_ROUNDING = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-3)}
_OF_HALF_PRECISION = (0.02, 0.05)
_NOISE, _TIMES = 2.0**-22, 8
_VALUES = 1 << 16


class Check:
    """The outputs of a model on an example, before anything is changed.

    Args:
        model: the model.
        example: a batch.
        forward: how to run the model on it.
        reduce: combines a tensor over ranks, which have to come to one verdict.
        watched: names of modules whose outputs have to stay as they are too.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        forward: Forward | None,
        reduce: Reduce | None,
        watched: Collection[str] = (),
    ) -> None:
        self.model, self.example, self.forward, self.reduce = model, example, forward, reduce
        self.watched = sorted(watched)
        self.before = self._outputs(example)

    def _outputs(self, example: Any) -> list[Tensor]:
        """Outputs of the model, and some values of those of the watched modules."""
        inner: list[Tensor] = []

        def note(_: nn.Module, args: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    inner.append(tensor.detach().flatten()[:: 1 + tensor.numel() // _VALUES].clone())

        handles = [self.model.get_submodule(name).register_forward_hook(note) for name in self.watched]
        try:
            return outputs(self.model, example, self.forward) + inner
        finally:
            for handle in handles:
                handle.remove()

    def excess(self) -> float:
        """The largest difference of an output from what it was, over what rounding may make of it."""
        after = self._outputs(self.example)
        pairs = list(zip(self.before, after, strict=False))
        differences = [_difference(old, new) for old, new in pairs]
        found = torch.tensor([d / _limits(old)[0] for d, (old, _) in zip(differences, pairs, strict=True)] or [0.0])
        if bool((found > 1).any()) and len(after) == len(self.before):
            limits = [self._noisy_limit(old, noise) for old, noise in zip(self.before, self._noise(after), strict=True)]
            found = torch.tensor([d / limit for d, limit in zip(differences, limits, strict=True)])
        if [t.shape for t in after] != [t.shape for t in self.before]:
            found = torch.tensor([torch.inf])
        worst = found.max()
        if self.reduce is not None:
            device = next((p.device for p in self.model.parameters()), worst.device)
            worst = self.reduce(worst.to(device), "max")
        return float(worst)

    @staticmethod
    def _noisy_limit(output: Tensor, noise: float) -> float:
        least, most = _limits(output)
        return min(max(least, _TIMES * noise), most)

    def _noise(self, after: Sequence[Tensor]) -> list[float]:
        """What the model, as it is now and gives `after`, makes of a little noise on the example, by output."""
        generator = torch.Generator().manual_seed(0)

        def noisy(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
            return x + x * signs.to(x.dtype) * _NOISE

        found = self._outputs(tree_map_only(Tensor, noisy, self.example))
        return [_difference(old, new) for old, new in zip(after, found, strict=True)]

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


def _limits(output: Tensor) -> tuple[float, float]:
    return _ROUNDING.get(output.dtype, _OF_HALF_PRECISION)


def _difference(old: Tensor, new: Tensor) -> float:
    """Norm of the difference, relative to that of the old output."""
    known = old.isfinite()
    if not bool(known.equal(new.isfinite())):
        return torch.inf
    old, new = old[known].double(), new[known].double()
    size = float(old.norm())
    if not size:
        return torch.inf if bool(new.any()) else 0.0
    return float((new - old).norm()) / size


def rescale(model: nn.Module, one: Rescaling) -> Callable[[], None] | None:
    """Rescale a pair and return what undoes it; None, and nothing changed, if values would overflow."""

    def get(name: str) -> Tensor | None:
        return parameter(model, name)

    with torch.no_grad():
        new = one.parameters(get)
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


def named_weights(model: nn.Module, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Parameters by name, without gradients."""
    return {name: found.detach() for name in names if (found := parameter(model, name)) is not None}
