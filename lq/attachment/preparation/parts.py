"""What channels can be rescaled by: parameters that make a tensor, and parameters that read it.

A tensor y of channels c is given ``y' = y / r + t`` instead. What makes it takes that up, ``weight / r`` and
``bias / r + t`` of a norm (or of a layer, by its output channels); all that reads it takes it back,
``weight * r`` by input channels and ``bias - (weight * r) @ t``. Everything is computed in float64, on the CPU (not
every device has it). Both sides are named by their parameters, so that no class of layer is known here.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Maker:
    """The parameters that make a tensor.

    Args:
        weight: name of the scale of a norm, or of the weight of a layer.
        bias: name of the bias; None: there is none.
        dim: dimension of the weight that the tensor's channels lie along.
    """

    weight: str
    bias: str | None
    dim: int = 0

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight that makes the rescaled tensor; `scale` is r, of shape (C,)."""
        shape = [1] * weight.ndim
        shape[self.dim] = -1
        return (_wide(weight) / _wide(scale).view(shape)).to(weight.dtype)

    @staticmethod
    def shifted(bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The bias that makes the rescaled tensor; `shift` is t, of shape (C,)."""
        shape = bias.shape
        return (_wide(bias).flatten() / _wide(scale) + _wide(shift)).view(shape).to(bias.dtype)


@dataclass(frozen=True)
class Reader:
    """The parameters of a layer that reads a tensor.

    Args:
        weight: name of the weight.
        bias: name of the bias; None: it cannot have one, only scales are taken back.
        groups: blocks of output channels that read channels of their own.
        transposed: input channels lie along dimension 0, as in transposed convolutions.
        makes_bias: the layer has no bias yet, and gets one if there is a shift.
    """

    weight: str
    bias: str | None
    groups: int = 1
    transposed: bool = False
    makes_bias: bool = False

    def channels(self, weight: Tensor) -> int:
        """How many channels it reads."""
        return weight.shape[0] if self.transposed else weight.shape[1] * self.groups

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight that reads the rescaled tensor."""
        return (self._split(_wide(weight)) * self._spread(scale, weight)).reshape(weight.shape).to(weight.dtype)

    def shifted(self, bias: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The bias that reads the rescaled tensor, given the weight that read the old one."""
        both = self._split(_wide(weight)) * self._spread(_wide(scale) * _wide(shift), weight)
        return (_wide(bias) - both.reshape(weight.shape[0], -1).sum(1)).to(bias.dtype)

    def largest(self, weight: Tensor) -> Tensor:
        """The largest absolute value that reads each channel, of shape (C,)."""
        split = self._split(weight.detach().abs())
        if self.transposed:
            return split.flatten(1).amax(1)
        return split.flatten(3).amax(3).amax(1).flatten()

    def _split(self, weight: Tensor) -> Tensor:
        """(groups, C_out / groups, C_in / groups, ...), or (C_in, ...) if transposed."""
        if self.transposed:
            return weight
        split: Tensor = weight.unflatten(0, (self.groups, -1))
        return split.unsqueeze(-1)  # so that there is always something behind the channels

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        shape = [1] * (like.ndim if self.transposed else like.ndim + 2)
        if self.transposed:
            shape[0] = -1
        else:
            shape[0], shape[2] = self.groups, like.shape[1]
        return _wide(values).view(shape)


_Part = TypeVar("_Part", Maker, Reader)


@dataclass(frozen=True)
class Pair:
    """A tensor whose channels can be rescaled: what makes it and all that reads it.

    Args:
        name: module of what makes it.
        kind: "norm", or "layer" for a convolution or a linear layer.
        maker: the parameters that make it.
        readers: the parameters of all that read it.
        channels: number of channels C.
        shifts: whether a shift t can be taken back too; only a scale r, if not.
        positive: only values above zero are read (behind a ReLU).
    """

    name: str
    kind: str
    maker: Maker
    readers: tuple[Reader, ...]
    channels: int
    shifts: bool = True
    positive: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that read it."""
        return tuple(reader.weight.rpartition(".")[0] or reader.weight for reader in self.readers)

    @property
    def parameters(self) -> set[str]:
        """Names of all parameters that are rescaled with it."""
        both = [(self.maker.weight, self.maker.bias), *((reader.weight, reader.bias) for reader in self.readers)]
        return {name for names in both for name in names if name is not None}

    def __str__(self) -> str:
        return f"{self.name or '(model)'} -> {', '.join(self.names)}"

    def without_new_biases(self) -> "Pair":
        """The pair with readers that keep having no bias, if they have none; such a pair is not shifted."""
        readers = tuple(replace(r, bias=None, makes_bias=False) if r.makes_bias else r for r in self.readers)
        return replace(self, readers=readers, shifts=self.shifts and all(r.bias is not None for r in readers))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Pair":
        """The inverse of `to_dict`, also after a way through JSON."""
        maker, readers = Maker(**values["maker"]), tuple(Reader(**reader) for reader in values["readers"])
        return cls(**{**values, "maker": maker, "readers": readers})

    def renamed(self, rename: Callable[[str], str]) -> "Pair":
        """With other names of parameters and modules."""

        def part(one: _Part) -> _Part:
            return replace(one, weight=rename(one.weight), bias=None if one.bias is None else rename(one.bias))

        return replace(self, name=rename(self.name), maker=part(self.maker), readers=tuple(map(part, self.readers)))


@dataclass(frozen=True)
class Left:
    """What was not rescaled, and why.

    Args:
        name: module of what makes the tensor.
        reason: why, as a sentence without its subject.
        advice: what the caller can do about it; empty if there is nothing to do.
    """

    name: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.reason}" + (f" ({self.advice})" if self.advice else "")


@dataclass(eq=False)
class Rescaling:
    """The r and t that a pair's tensor was rescaled with, of shape (C,) in float32."""

    pair: Pair
    scale: Tensor
    shift: Tensor

    def then(self, scale: Tensor, shift: Tensor) -> "Rescaling":
        """This rescaling followed by another one."""
        total = self.shift / scale + shift
        return Rescaling(self.pair, self.scale * scale, total)

    def without_shift(self) -> "Rescaling":
        """The same r, and no t."""
        return Rescaling(self.pair, self.scale, torch.zeros_like(self.shift))

    def parameters(self, get: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """The rescaled parameters by name, from those that `get` gives; it gives None for a bias that is not there.

        Raises:
            KeyError: if `get` does not know a weight.
        """
        found: dict[str, Tensor] = {}
        maker, shifting = self.pair.maker, bool((self.shift != 0).any())
        for reader in self.pair.readers:
            weight = _known(get, reader.weight)
            found[reader.weight] = reader.scaled(weight, self.scale)
            if shifting and reader.bias is not None:
                bias = get(reader.bias)
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                found[reader.bias] = reader.shifted(bias, weight, self.scale, self.shift)
        found[maker.weight] = maker.scaled(_known(get, maker.weight), self.scale)
        if maker.bias is not None:
            found[maker.bias] = maker.shifted(_known(get, maker.bias), self.scale, self.shift)
        return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _known(get: Callable[[str], Tensor | None], name: str) -> Tensor:
    value = get(name)
    if value is None:
        raise KeyError(name)
    return value
