"""Quantizers that do something else for a while, or round whatever they do."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer


@contextmanager
def tapped(taps: Mapping[Any, Callable[[Tensor], Tensor] | None]) -> Iterator[None]:
    """Have quantizers return what their taps make of their tensors; None: they round."""
    before = {quantizer: quantizer.tap for quantizer in taps}
    try:
        for quantizer, tap in taps.items():
            quantizer.tap = tap
        yield
    finally:
        for quantizer, tap in before.items():
            quantizer.tap = tap


def rounded(quantizer: Quantizer, x: Tensor) -> Tensor:
    """`x` rounded, whatever the quantizer's tap is."""
    tap, quantizer.tap = quantizer.tap, None
    try:
        if not isinstance(quantizer, WeightQuantizer):
            return quantizer(x)  # type: ignore[no-any-return]
        if not quantizer.calibrated or quantizer.outdated:  # of a weight at a call, found at the first use
            quantizer.calibrate(x)
        return quantizer._quantize(x)
    finally:
        quantizer.tap = tap
