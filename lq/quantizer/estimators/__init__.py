"""Gradient estimators: what of a quantizer is learned, and how gradients pass the rounding; a short file each."""

from lq.quantizer.estimators.estimator import Estimator as Estimator
from lq.quantizer.estimators.ewgs import EWGS as EWGS
from lq.quantizer.estimators.ewgs import AdaptiveEWGS as AdaptiveEWGS
from lq.quantizer.estimators.lsq import LSQ as LSQ
from lq.quantizer.estimators.lsq_plus import LSQPlus as LSQPlus
from lq.quantizer.estimators.names import ESTIMATORS as ESTIMATORS
from lq.quantizer.estimators.names import estimator as estimator
from lq.quantizer.estimators.noise_scale import NoiseScale as NoiseScale
from lq.quantizer.estimators.stableqat import StableQAT as StableQAT
from lq.quantizer.estimators.ste import STE as STE
