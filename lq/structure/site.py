"""A site: one tensor of a model that a quantizer can round, and the name it goes by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lq.structure.places import call_of
from lq.structure.sources import Source

#: What a site holds: a weight, an activation that is multiplied, a tensor on a skip path, or a result that integer
#: kernels need the step of: the last tensor of a branch, which only a residual sum reads, or what a convolution gives
#: to others than products.
Role = Literal["weight", "activation", "skip", "result"]


@dataclass(frozen=True)
class Site:
    """A place for a quantizer.

    Args:
        module: name of the module it belongs to.
        place: "weight", "input" or "output" of that module, or an operand or result of one of its calls, such as
            "matmul_0_left".
        role: "weight", "activation", "skip" or "result".
        shape: shape of the tensor, for one example batch.
        shares: name of an earlier site that reads the same tensor; None: there is none.
        concat: number of the concatenation it belongs to; None: none.
        covered_by: names of skip and result sites that, together, quantize all that it reads.
        network_input: it reads the network's own input.
        channels: number of output channels of a weight at a call; 0: not one.
        normalized: a layer norm, or another over channels, is among those who read it, as in pre-norm transformers.
        probabilities: it is what a softmax gives.
        gelu: it is what a GELU gives, or a function like it (`lq.structure.values.GELUS`).
        source: the parameter that a weight at a call is, or a part of; None: it is computed first.
    """

    module: str
    place: str
    role: Role
    shape: tuple[int, ...] = ()
    shares: str | None = None
    concat: int | None = None
    covered_by: tuple[str, ...] = ()
    network_input: bool = False
    channels: int = 0
    normalized: bool = False
    probabilities: bool = False
    gelu: bool = False
    source: Source | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Mapping):  # from JSON
            object.__setattr__(self, "source", Source.from_dict(self.source))

    @property
    def name(self) -> str:
        """Name of the site in the model."""
        return f"{self.module}.{self.place}".lstrip(".")

    @property
    def at_call(self) -> bool:
        """Whether it belongs to a call inside the module's forward."""
        return self.place not in ("weight", "input", "output")

    @property
    def layer(self) -> str:
        """Name of the layer or call it belongs to, the one that name patterns match.

        >>> Site("attn", "matmul_0_left", "activation").layer
        'attn.matmul_0'
        """
        return f"{self.module}.{call_of(self.place)}".lstrip(".") if self.at_call else self.module


def weight_key(prefix: str, slot: str) -> str:
    """Name of the quantizer of an operand that is made of parameters alone."""
    return prefix + slot if slot.startswith("weight") else f"{prefix}{slot}_weight"


def activation_key(prefix: str, slot: str) -> str:
    """Name of the quantizer of an operand that depends on the input."""
    return f"{prefix}{slot}_activation" if slot.startswith("weight") else prefix + slot


def is_weight_key(key: str) -> bool:
    """Whether a call's quantizer is one of a weight, by its name."""
    return "_weight" in key and not key.endswith("_activation")
