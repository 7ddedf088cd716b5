"""Gradient estimators: what of a quantizer is learned, and how gradients pass the rounding; a short file each."""

from lq.estimators.estimator import Estimator as Estimator
from lq.estimators.ewgs import EWGS as EWGS
from lq.estimators.ewgs import AdaptiveEWGS as AdaptiveEWGS
from lq.estimators.lsq import LSQ as LSQ
from lq.estimators.lsq_plus import LSQPlus as LSQPlus
from lq.estimators.names import ESTIMATORS as ESTIMATORS
from lq.estimators.names import estimator as estimator
from lq.estimators.noise_scale import NoiseScale as NoiseScale
from lq.estimators.ste import STE as STE
