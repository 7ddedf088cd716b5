"""Reading a quantized model: its quantizers, by layer, call and site.

>>> import lq
>>> from torch import nn
>>> model = lq.attach(nn.Sequential(nn.Linear(4, 4)), weights=4, first_last=None)
>>> [quantizer.spec.bits for quantizer in quantizers(model)]
[4]
"""

from lq.attachment.sites import (
    activation_quantizers,
    calls,
    float_weight,
    input_quantizer,
    is_attached,
    quantized_layers,
    quantizers,
    weight_quantizer,
)

__all__ = [
    "activation_quantizers",
    "calls",
    "float_weight",
    "input_quantizer",
    "is_attached",
    "quantized_layers",
    "quantizers",
    "weight_quantizer",
]
