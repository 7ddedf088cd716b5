"""Gradient estimators by name."""

from lq.errors import SpecError
from lq.estimators.estimator import Estimator
from lq.estimators.ewgs import EWGS, AdaptiveEWGS
from lq.estimators.lsq import LSQ
from lq.estimators.lsq_plus import LSQPlus
from lq.estimators.noise_scale import NoiseScale
from lq.estimators.ste import STE

#: Kinds of estimators, by name.
ESTIMATORS: dict[str, type[Estimator]] = {
    "ste": STE,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "ewgs": EWGS,
    "adaptive_ewgs": AdaptiveEWGS,
    "noise_scale": NoiseScale,
}


def estimator(value: str | Estimator) -> Estimator:
    """The estimator of a name, with its defaults; an estimator is returned as it is.

    Raises:
        SpecError: for an unknown name.

    >>> estimator("lsq")
    LSQ()
    """
    if isinstance(value, Estimator):
        return value
    if value not in ESTIMATORS:
        raise SpecError(f"estimator={value!r} is unknown; use one of {tuple(ESTIMATORS)}")
    return ESTIMATORS[value]()
