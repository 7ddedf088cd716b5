"""Range rules: from values to the clipping range of a grid. Interchangeable; one short file each."""

from lq.errors import SpecError
from lq.quantizer.ranges.lp import Lp as Lp
from lq.quantizer.ranges.lsq import LsqInit as LsqInit
from lq.quantizer.ranges.minmax import MinMax as MinMax
from lq.quantizer.ranges.percentile import Percentile as Percentile
from lq.quantizer.ranges.rule import Levels as Levels
from lq.quantizer.ranges.rule import RangeRule as RangeRule
from lq.quantizer.ranges.rule import Samples as Samples

_NAMED: dict[str, RangeRule] = {"minmax": MinMax(), "percentile": Percentile(), "lp": Lp(), "lsq": LsqInit()}


def range_rule(rule: str | RangeRule, *, bits: int, weights: bool = True) -> RangeRule:
    """The rule itself, the rule of that name, or the default: L_p, but min-max for weights of 8 bits and more.

    "output" begins as the default does; `lq.calibration.output_ranges` goes on from there.

    >>> range_rule("auto", bits=8)
    MinMax()
    >>> range_rule("auto", bits=4)
    Lp(p=2.4, candidates=100, relative=True)
    """
    if not isinstance(rule, str):
        return rule
    if rule in ("auto", "output"):
        return _NAMED["minmax" if weights and bits >= 8 else "lp"]
    if rule not in _NAMED:
        names = ", ".join(map(repr, ["auto", *_NAMED, "output"]))
        raise SpecError(f"range={rule!r} is unknown; use {names} or a rule object")
    return _NAMED[rule]
