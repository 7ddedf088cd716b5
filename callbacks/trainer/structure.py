"""The structure of a module in a Trainer: given, or found by running it once on what the Trainer has to run it on."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lq.attachment.options import QuantizeOptions
from lq.attachment.scheme import KINDS
from lq.attachment.sites import common_module, weight_quantizer
from lq.attachment.unseen import unseen_layers
from lq.callbacks.trainer.data import first_batch, forward_of, run_example
from lq.callbacks.trainer.steps import teachers_of
from lq.errors import DataError
from lq.structure.forward import Forward
from lq.structure.inspection import inspect
from lq.structure.structure import Structure

#: A batch, and how the module is run on it.
Example = tuple[Any, Forward]


@dataclass(frozen=True)
class Inspection:
    """What a module was found to be.

    Args:
        structure: its structure; None if it could not be run.
        example: what it was run on; None if it was not.
    """

    structure: Structure | None
    example: Example | None = None


def example_of(trainer: pl.Trainer, module: pl.LightningModule, options: QuantizeOptions) -> Example | None:
    """An example to run the module on, and how; None if there is none."""
    if module.example_input_array is not None:
        return module.example_input_array, run_example
    batch = first_batch(trainer, module)
    return None if batch is None else (batch, forward_of(trainer, module, options.forward))


def inspect_module(trainer: pl.Trainer, module: pl.LightningModule, options: QuantizeOptions) -> Inspection:
    """The structure that was given, or found by running the module.

    Raises:
        DataError: if the module cannot be run, and the options need its structure.
    """
    if options.structure is not None:
        return Inspection(_of_this_module(options, module))
    try:
        example = example_of(trainer, module, options)
        if example is None and not options.needs_structure:
            rank_zero_info(
                f"Quantize: neither example_input_array nor data to look at {type(module).__name__} with; its "
                "layers are quantized by their class, or as the checkpoint has it"
            )
            return Inspection(None)
        batch, forward = example or (None, forward_of(trainer, module, options.forward))
        with isolate_rng():
            structure = inspect(module, batch, forward=forward)
        return Inspection(structure.without(teachers_of(module)), example)
    except DataError as error:
        if options.needs_structure:
            raise
        rank_zero_warn(
            f"{type(module).__name__} could not be looked at: {error}. Its layers are quantized by their class; "
            "attention and other functional calls stay float. Set example_input_array, or pass forward= or "
            "structure= to Quantize"
        )
        return Inspection(None)


def _of_this_module(options: QuantizeOptions, module: pl.LightningModule) -> Structure | None:
    """The structure that was given, by the names of this module: its own may start at a submodule."""
    structure = options.read_structure()
    if structure is None:
        return None
    missing = {site.module for site in structure.sites} - dict(module.named_modules()).keys()
    return structure.under(common_module(module)[0]) if missing else structure


def tell_unseen(module: pl.LightningModule, structure: Structure | None) -> None:
    """Say which layers with quantizers the example did not reach."""
    names = [] if structure is None else unseen_layers(module, structure, KINDS)[0]
    unseen = [name for name in names if weight_quantizer(module.get_submodule(name)) is not None]
    if unseen:
        few = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
        rank_zero_info(f"Quantize: layers that the example did not reach are quantized by their class: {few}")
