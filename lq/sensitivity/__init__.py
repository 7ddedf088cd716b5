"""Sensitivity: what a width costs, for every channel of every weight and every activation, from one pass."""

from lq.sensitivity.brute_force import BruteForce as BruteForce
from lq.sensitivity.hawq import HawqV2 as HawqV2
from lq.sensitivity.measure import measure_sensitivity as measure_sensitivity
from lq.sensitivity.measure import metric_of as metric_of
from lq.sensitivity.metric import Metric as Metric
from lq.sensitivity.metrics import Fisher as Fisher
from lq.sensitivity.metrics import OutputDistortion as OutputDistortion
from lq.sensitivity.table import Sensitivity as Sensitivity
from lq.sensitivity.table import TensorSensitivity as TensorSensitivity
