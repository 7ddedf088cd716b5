"""Gradient estimators by name."""

from lq.errors import SpecError
from lq.quantizer.estimators.estimator import Estimator
from lq.quantizer.estimators.ewgs import EWGS, AdaptiveEWGS
from lq.quantizer.estimators.lsq import LSQ
from lq.quantizer.estimators.lsq_plus import LSQPlus
from lq.quantizer.estimators.noise_scale import NoiseScale
from lq.quantizer.estimators.stableqat import StableQAT
from lq.quantizer.estimators.ste import STE

#: Kinds of estimators, by name.
ESTIMATORS: dict[str, type[Estimator]] = {
    "ste": STE,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "ewgs": EWGS,
    "adaptive_ewgs": AdaptiveEWGS,
    "noise_scale": NoiseScale,
    "stableqat": StableQAT,
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
