"""Roundings of weights: how the level of each is chosen. Interchangeable; one short file each."""

from collections.abc import Callable

from lq.errors import SpecError
from lq.reconstruction.rounding.adaround import AdaRound as AdaRound
from lq.reconstruction.rounding.grid import WeightGrid as WeightGrid
from lq.reconstruction.rounding.nearest import Nearest as Nearest
from lq.reconstruction.rounding.rounding import LearnedRounding as LearnedRounding
from lq.reconstruction.rounding.rounding import Rates as Rates
from lq.reconstruction.rounding.rounding import Rounding as Rounding
from lq.reconstruction.rounding.softmax import AnnealingSoftmax as AnnealingSoftmax
from lq.reconstruction.rounding.ste import StraightThrough as StraightThrough

_NAMED: dict[str, Callable[[], Rounding]] = {
    "nearest": Nearest,
    "adaround": AdaRound,
    "softmax": AnnealingSoftmax,
    "wide_softmax": lambda: AnnealingSoftmax(offsets=(-1, 0, 1)),
    "ste": StraightThrough,
}


def rounding_of(rounding: str | Rounding) -> Rounding:
    """The rounding itself, or the one of that name.

    >>> rounding_of("adaround").penalty
    0.01
    """
    if isinstance(rounding, Rounding) and not isinstance(rounding, type):
        return rounding
    if not isinstance(rounding, str) or rounding not in _NAMED:
        names = ", ".join(map(repr, _NAMED))
        raise SpecError(
            f"rounding={rounding!r} is unknown; use {names} or a rounding object, of a subclass of Rounding"
        )
    return _NAMED[rounding]()
