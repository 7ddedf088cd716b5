"""Whether a module that has quantizers already has those that `Quantize` would attach."""

import lightning.pytorch as pl
from torch import nn

from lq.attachment.attach import attached_plan
from lq.attachment.options import SiteOptions
from lq.attachment.scheme import plan_sites
from lq.attachment.sites import input_quantizer
from lq.errors import StateError
from lq.structure.structure import Structure


def require_same(module: pl.LightningModule, options: SiteOptions, structure: Structure | None) -> None:
    """Raise if the module was quantized otherwise than the options say; one built from a checkpoint may be.

    Args:
        module: a module with quantizers.
        options: what was asked for.
        structure: the structure that they were attached by; None: another callback or a call attached them, and what
            the layers' classes do not tell cannot be compared.
    """
    present = attached_plan(module)
    if present is None:
        return
    plan = plan_sites(module, options.with_structure(structure))
    specs = {name: planned.spec for name, planned in plan.items() if planned.owner is None}
    if structure is None:
        of_layers = {name: spec for name, spec in present.items() if name.endswith((".weight", ".input"))}
        shared = specs.keys() - of_layers.keys() - {name for name in specs if not _shares(module, name)}
        present, specs = of_layers, {name: spec for name, spec in specs.items() if name not in shared}
    if present != specs:
        name = next(name for name in [*specs, *present] if specs.get(name) != present.get(name))
        raise StateError(
            f"{type(module).__name__} is quantized already, and not as this Quantize callback says: at {name!r} it "
            f"has {present.get(name)}, asked is {specs.get(name)}; "
            "lq.detach(module) first, or use the same arguments"
        )


def _shares(module: nn.Module, site: str) -> bool:
    """Whether the input of a layer is quantized by the quantizer of another."""
    layer, _, place = site.rpartition(".")
    quantizer = input_quantizer(module.get_submodule(layer))
    return place == "input" and quantizer is not None and quantizer.name != site
