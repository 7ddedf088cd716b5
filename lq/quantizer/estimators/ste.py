r"""Straight-through: ``dx^/dx = 1`` inside the grid and 0 outside; the grid stays as calibrated.

Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation, 2013;
with the mask outside the grid as in Hubara et al., Quantized Neural Networks, JMLR 2018.
"""

from dataclasses import dataclass

from lq.quantizer.estimators.estimator import Estimator


@dataclass(frozen=True)
class STE(Estimator):
    """Gradients pass to the values alone."""
