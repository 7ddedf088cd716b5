"""What a module needs before quantizers can be attached, or calibrated.

Values, shapes, the folding that a checkpoint has, and channels whose ranges fit few bits (`lq.prepare`).
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy

from lq.attachment.checkpoint import folds_otherwise, planned_by, rebuild
from lq.attachment.float_models import float_model
from lq.attachment.preparation.parts import Pair
from lq.attachment.preparation.prepare import Plan, apply, plan_pairs
from lq.attachment.preparation.prepare import Preparation as Report
from lq.attachment.preparation.stored import is_marker, match
from lq.attachment.preparation.strength import Widths
from lq.attachment.scheme import PlannedSite
from lq.attachment.sites import is_attached
from lq.callbacks.trainer.averages import averages
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.errors import DataError, SpecError, StateError
from lq.structure.forward import Forward, eval_mode, run


def require_values(module: nn.Module) -> None:
    """Raise if parameters are on the meta device: ranges are found from values."""
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if names:

        def stay() -> nn.Module:
            del module.__dict__["cpu"]
            return module

        module.__dict__["cpu"] = stay  # a Trainer moves the module there after an error, and fails: that hides this one
        raise StateError(
            f"{type(module).__name__} has {len(names)} parameters without values, on the meta device, such as "
            f"{names[0]}; Quantize finds ranges from values: give them before fit (module.to_empty(device='cpu') and "
            "load_state_dict), or build the layers in configure_model"
        )


def is_uninitialised(module: nn.Module) -> bool:
    """Whether layers wait for their first input to know their shapes."""
    return any(is_lazy(tensor) for tensor in [*module.parameters(), *module.buffers()])


def initialise_lazy_layers(module: nn.Module, example: tuple[Any, Forward] | None) -> None:
    """Run the module once, in eval mode, so that lazy layers get their shapes.

    Args:
        module: a module with lazy layers.
        example: a batch and how to run the module on it; None if there is none.

    Raises:
        DataError: if there is no example, the module does not take it, or it leaves a layer as it is.
    """
    failed = ""
    if example is not None:
        try:
            with eval_mode(module), torch.no_grad():
                run(module, *example)
        except DataError as error:
            failed = f" ({error})"
    tensors = [*module.named_parameters(), *module.named_buffers()]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name, tensor in tensors if is_lazy(tensor)))
    if names:
        raise DataError(
            f"{type(module).__name__} has lazy layers that Quantize could not give their shapes: "
            f"{', '.join(names[:3])}{failed}; set example_input_array, or run the module on a batch before fit"
        )


def rebuild_from_checkpoint(module: pl.LightningModule, check: Callable[[pl.LightningModule, bool], bool]) -> None:
    """Have the module build what a quantized checkpoint has and it has not, when it is restored.

    Those are quantizers, if it has none or those of its layers' classes, and BatchNorms that are folded or not.

    Args:
        module: the module that will be restored.
        check: called before a quantized checkpoint is restored, with whether it has other BatchNorms folded; returns
            whether the checkpoint knows better which quantizers there are.
    """
    if hasattr(module.on_load_checkpoint, "rebuilds"):
        return
    restore = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint.get("state_dict", {})
        if any(map(is_marker, state_dict)):
            match(module, state_dict)
        if planned_by(state_dict):
            otherwise = folds_otherwise(module, state_dict)
            guessed = check(module, otherwise)
            if otherwise or guessed or not is_attached(module):
                rebuild(module, state_dict)
        restore(checkpoint)

    on_load_checkpoint.rebuilds = vars(module).get("on_load_checkpoint")  # type: ignore[attr-defined]
    module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]


def leave_checkpoints_alone(module: pl.LightningModule) -> None:
    """Undo `rebuild_from_checkpoint`."""
    if hasattr(module.on_load_checkpoint, "rebuilds"):
        before = module.__dict__.pop("on_load_checkpoint").rebuilds
        if before is not None:
            module.on_load_checkpoint = before  # type: ignore[method-assign]


def known_choice(prepare: bool | Literal["auto"]) -> bool | Literal["auto"]:
    """The argument, if it is one that `Quantize` knows.

    Raises:
        SpecError: if it is not.
    """
    if prepare not in (True, False, "auto"):
        raise SpecError(f"prepare={prepare!r} is unknown; use True, False or 'auto'")
    return prepare


class Preparation:
    """`lq.prepare` in two steps: pairs are found before quantizers are there, ranges when there are training data.

    Args:
        module: a module without quantizers.
        example: what to look at the module with, and how to run it; None: there is nothing.
        sites: what will be quantized.
        choice: "auto" takes the norms whose results are read with fewer than 8 bits; True takes all.

    Attributes:
        report: what was done; None before fitting starts.

    Raises:
        DataError: if there is no example.
    """

    def __init__(
        self,
        module: nn.Module,
        example: tuple[Any, Forward] | None,
        sites: Mapping[str, PlannedSite],
        choice: bool | Literal["auto"],
    ) -> None:
        if example is None:
            raise DataError(
                f"Quantize(prepare={choice!r}) has to run {type(module).__name__} to see what reads its norms, and has "
                "nothing to run it on; set example_input_array, or give fit a train dataloader"
            )
        self._weights = {s.site.module: max(s.spec.widths) for s in sites.values() if s.site.role == "weight"}
        self._activations: dict[str, int] = {}
        for planned in sites.values():
            if planned.site.role == "activation":
                least = self._activations.get(planned.site.module, 16)
                self._activations[planned.site.module] = min(least, max(planned.spec.widths))
        self.report: Report | None = None
        plan = plan_pairs(module, *example)
        wanted = [pair for pair in plan.pairs if choice is True or (self.widths(pair).activations or 8) < 8]
        self.plan = Plan(tuple(wanted), plan.left)

    def widths(self, pair: Pair) -> Widths:
        """The least widths that a pair's tensor, and the weights behind it, will have."""
        modules = [reader.weight.rpartition(".")[0] for reader in pair.readers]
        found = [[known[name] for name in modules if name in known] for known in (self._weights, self._activations)]
        return Widths(*(min(some, default=None) for some in found))

    def apply(self, trainer: pl.Trainer, module: pl.LightningModule, samples: int, forward: Forward | None) -> None:
        """Rescale on training samples, on all ranks alike; averages of the module too.

        Optimizers and strategies know the parameters by now, so that no layer gets a bias that it has not.
        """
        batches = training_batches(trainer, samples, "Preparing")
        example = next(batches)
        with float_model(module):
            self.report = apply(
                module,
                replace(self.plan, pairs=tuple(pair.without_new_biases() for pair in self.plan.pairs)),
                itertools.chain([example], batches),
                example,
                equalize=None,
                widths=self.widths,
                forward=forward_of(trainer, module, forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
            )
        for average in averages(trainer):
            match(average, module.state_dict())
            average.load_state_dict(module.state_dict())
        left = f"; left: {'; '.join(map(str, self.report.left))}" if self.report.left else ""
        rank_zero_info(f"Quantize rescaled what {len(self.report.pairs)} norms of {type(module).__name__} give{left}")
