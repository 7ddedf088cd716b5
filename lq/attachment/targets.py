"""Whether an engine runs what is quantized, and in integers: of a plan, before anything is trained, and of a model.

What it refuses is one error that names the tensors, the option and the alternative; what it computes in float is a
warning. The rules are in `lq.quantizer.targets`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from lq.attachment.options import SiteOptions
from lq.attachment.scheme import PlannedSite
from lq.attachment.sites import quantizers
from lq.errors import NoEffectWarning
from lq.quantizer.levels import middle
from lq.quantizer.log_quantizer import LogQuantizer
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.targets import Grid, Target, Zero, target_of


def check_plan(plan: Mapping[str, PlannedSite], options: SiteOptions) -> None:
    """Look at what will be quantized with the eyes of ``options.target``, if there is one.

    Raises:
        SpecError: if the engine does not run it.
    """
    target = target_of(options.target)
    if target is None:
        return
    grids = {
        name: Grid.of(planned.spec, is_weight=planned.site.role == "weight")
        for name, planned in plan.items()
        if planned.owner is None
    }
    target.refuse(grids)
    found = [*_left_in_float(grids, options, target), *target.in_float(grids)]
    if found:
        warnings.warn(
            f"target={target.name!r} computes a part of this network in float, right but not faster: "
            f"{'; '.join(found)}",
            NoEffectWarning,
            stacklevel=2,
        )


def check_model(model: nn.Module, target: Target) -> None:
    """Look at the quantizers of a model, whose widths may have changed since they were attached.

    Raises:
        SpecError: if the engine does not run it.
    """
    target.refuse({q.name: grid for q in quantizers(model) if (grid := grid_of(q)) is not None})


@torch.no_grad()
def grid_of(quantizer: Quantizer) -> Grid | None:
    """The grid that a quantizer has; None: it has none, as calibration did not come there or all of it is pruned.

    Before calibration it is what the spec says; widths that are being learned are rounded.
    """
    bits, zero_point = quantizer.bits.detach().reshape(-1), quantizer.zero_point.detach().reshape(-1)
    kept = bits >= 0.5  # pruned ones have no zero point
    if quantizer.unreached or not bool(kept.any()):
        return None
    widths = tuple(int(width) for width in bits.round().unique().tolist())
    if not quantizer.calibrated and quantizer.spec is not None:
        return replace(Grid.of(quantizer.spec, is_weight=quantizer.is_weight), widths=widths)
    at_middle = bool(((zero_point - middle(bits)).abs() < 0.5)[kept].all())  # half a level
    zero: Zero = "middle" if at_middle else "anywhere" if bool(zero_point[kept].any()) else "lowest"
    return Grid(quantizer.is_weight, widths, frozenset([zero]), isinstance(quantizer, LogQuantizer))


def _left_in_float(grids: Mapping[str, Grid], options: SiteOptions, target: Target) -> list[str]:
    """What the options leave in float as a whole."""
    weights = any(grid.is_weight for grid in grids.values())
    if not weights or all(grid.is_weight for grid in grids.values()):
        left, which = ("activations", "weights") if weights else ("weights", "activations")
        return [f"{which} alone are quantized, so that no product is of integers: use {left}=8"]
    return [] if options.integer else [f"{target.without_integer}: use integer=True"]
