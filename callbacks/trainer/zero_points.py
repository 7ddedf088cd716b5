"""Zero points that are learned: kept on their grids while they are trained, integers when training is over."""

import torch
from torch import nn

from lq.attachment.sites import quantizers


@torch.no_grad()
def hold_zero_points(module: nn.Module) -> None:
    """Keep learned zero points such that zero stays a level, and they are learned on."""
    for quantizer in quantizers(module):
        if quantizer.learns_offset:
            highest = torch.exp2(quantizer.bits) - 1
            quantizer.zero_point.copy_(torch.minimum(quantizer.zero_point.clamp(min=0.51), highest))


@torch.no_grad()
def finish_zero_points(module: nn.Module) -> None:
    """Round learned zero points, as they are used; take up what was put in place of quantizers' state, as averages."""
    for quantizer in quantizers(module):
        if quantizer.learns_offset:
            quantizer.zero_point.round_()
        quantizer.refresh()
