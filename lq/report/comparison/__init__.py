"""Where a quantized network differs from the float one, layer by layer, and what to try next."""

from lq.report.comparison.closeness import Closeness as Closeness
from lq.report.comparison.compare import compare as compare
from lq.report.comparison.compare import float_reference as float_reference
from lq.report.comparison.result import Comparison as Comparison
from lq.report.comparison.result import LayerComparison as LayerComparison
from lq.report.comparison.result import Part as Part
