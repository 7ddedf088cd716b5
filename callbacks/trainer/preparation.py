"""`lq.prepare` in a Trainer: channels whose ranges fit few bits, before quantizers get theirs."""

import itertools
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lq.attachment.float_models import float_model
from lq.attachment.options import QuantizeOptions
from lq.attachment.preparation.parts import Pair
from lq.attachment.preparation.prepare import Plan, apply, plan_pairs
from lq.attachment.preparation.prepare import Preparation as Report
from lq.attachment.preparation.stored import match
from lq.attachment.preparation.strength import Widths
from lq.attachment.scheme import plan_sites
from lq.callbacks.trainer.averages import averages
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.errors import DataError
from lq.structure.forward import Forward


class Preparation:
    """`lq.prepare` in two steps: pairs are found before quantizers are there, ranges when there are training data.

    Args:
        module: a module without quantizers.
        example: what to run the module on, and how; None: there is nothing.
        options: what will be quantized. ``prepare="auto"`` takes the norms whose results are read with fewer than 8
            bits; True takes all.

    Attributes:
        report: what was done; None before fitting starts.

    Raises:
        DataError: if there is no example.
    """

    def __init__(self, module: nn.Module, example: tuple[Any, Forward] | None, options: QuantizeOptions) -> None:
        if example is None:
            raise DataError(
                f"Quantize(prepare={options.prepare!r}) has to run {type(module).__name__} to see what reads its "
                "norms, and has nothing to run it on; set example_input_array, or give fit a train dataloader"
            )
        self._weights: dict[str, int] = {}
        self._activations: dict[str, int] = {}
        for planned in plan_sites(module, options).values():
            least = self._weights if planned.site.role == "weight" else self._activations
            least[planned.site.module] = min(least.get(planned.site.module, 16), max(planned.spec.widths))
        self.report: Report | None = None
        plan = plan_pairs(module, *example)
        wanted = [pair for pair in plan.pairs if options.prepare is True or (self.widths(pair).activations or 8) < 8]
        self.plan = Plan(tuple(wanted), plan.left)

    def widths(self, pair: Pair) -> Widths:
        """The least widths that a pair's tensor, and the weights behind it, will have."""
        modules = [reader.weight.rpartition(".")[0] for reader in pair.readers]
        weights, activations = (
            [known[name] for name in modules if name in known] for known in (self._weights, self._activations)
        )
        return Widths(min(weights, default=None), min(activations, default=None))

    def apply(self, trainer: pl.Trainer, module: pl.LightningModule, options: QuantizeOptions) -> None:
        """Rescale on training samples, on all ranks alike; averages of the module too.

        Optimizers and strategies know the parameters by now, so that no layer gets a bias that it has not.
        """
        batches = training_batches(trainer, options.calibration_samples, "Preparing")
        example = next(batches)
        with float_model(module):
            self.report = apply(
                module,
                replace(self.plan, pairs=tuple(pair.without_new_biases() for pair in self.plan.pairs)),
                itertools.chain([example], batches),
                example,
                equalize=None,
                widths=self.widths,
                forward=forward_of(trainer, module, options.forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
            )
        for average in averages(trainer):
            match(average, module.state_dict())
            average.load_state_dict(module.state_dict())
        left = f"; left: {'; '.join(map(str, self.report.left))}" if self.report.left else ""
        rank_zero_info(f"Quantize rescaled what {len(self.report.pairs)} norms of {type(module).__name__} give{left}")
