"""Padding in torch's own transformers: they drop padded tokens on a path of their own, which quantizers are not on.

In eval mode without gradients, `nn.TransformerEncoder` makes nested tensors of what a padding mask leaves, for fused
layers that take them. The layers beneath take none: with a hook or a quantizer on one of them that path fails. Without
it the rows of tokens that count are the same; those of padded tokens are no longer 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lq.attachment.interception import call_quantizers
from lq.attachment.sites import INPUT, OUTPUT

# Attribute of an encoder: whether it is lq that took the choice from it.
_TAKEN = "_lq_keeps_padded"


def keep_padded(model: nn.Module) -> None:
    """Have encoders with quantizers on tensors keep padded tokens, the others do what they did before."""
    for encoder in _encoders(model):
        quantized = any({INPUT, OUTPUT} & part._modules.keys() or call_quantizers(part) for part in encoder.modules())
        if quantized and encoder.use_nested_tensor:
            encoder.use_nested_tensor, encoder.__dict__[_TAKEN] = False, True
        elif not quantized and encoder.__dict__.pop(_TAKEN, False):
            encoder.use_nested_tensor = True


@contextmanager
def padded(*models: nn.Module) -> Iterator[None]:
    """All encoders of `models` keep padded tokens meanwhile, so that hooks see tensors as they come in training."""
    chosen = [encoder for model in models for encoder in _encoders(model) if encoder.use_nested_tensor]
    for encoder in chosen:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder in chosen:
            encoder.use_nested_tensor = True


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    kind = nn.TransformerEncoder
    return [
        m for m in model.modules() if isinstance(m, kind) and isinstance(getattr(m, "use_nested_tensor", None), bool)
    ]
