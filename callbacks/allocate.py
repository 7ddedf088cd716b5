"""Allocate widths before training: measure sensitivity on training batches, solve the knapsack, write the widths.

It runs in ``on_fit_start``, after `Quantize` has calibrated and before optimizers step; with ``Trainer(max_epochs=0)``
it is all that happens. What was allocated is in the callback's state, so that a resumed run measures nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lq.allocation.allocate import Allocation, Granularity, Joint, allocate
from lq.allocation.budget import Latency, parse_budget
from lq.allocation.solvers import solver as solver_of
from lq.attachment.attach import set_bits
from lq.attachment.sites import activation_quantizers, require_attached
from lq.attachment.summary import summary
from lq.calibration.calibration import needs_calibration
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.data import calibrate_on_training_data, forward_of, reduce_over, training_batches
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.callbacks.trainer.reports import report_path, write_text
from lq.callbacks.trainer.steps import call_step, quiet
from lq.errors import SpecError, StateError
from lq.sensitivity import Sensitivity, measure_sensitivity, metric_of
from lq.sensitivity.metric import Metric
from lq.structure.forward import Forward

Budget = float | str | Latency | Mapping[str, Any]


class AllocateBits(ModuleCallback):
    """Give every layer, or every channel, the width that loses least within a budget.

    Put it after `Quantize`. The loss that Fisher, HAWQ-V2 and other metrics with a ``loss`` measure is the module's
    ``calibration_loss(batch)`` if it has one, else the cross-entropy of batches ``(input, classes)``, else what
    ``training_step`` returns.

    Args:
        budget: mean weight bits (``3.0``), compression (``"8x"``), stored bytes (``"1.5MB"``), bit operations per
            sample (``"2.5GBitOps"``), a `Latency`, "same" (the bytes that `Quantize`'s widths come to), or a list of
            several that all hold.
        sensitivity: "fisher" (MPQCO), "model_fisher" (labels of the model itself), "output_distortion" (RDO-Q),
            "hawq_v2", "kl" (ZeroQ), or a metric object.
        solver: "greedy" (MPQCO), "lagrangian" (RDO-Q) or "exact".
        bits: widths that weights may have, from 0 (pruned) to 8; by default 1 to 8.
        granularity: "layer" or "channel".
        activations: None keeps their widths; a number is their own budget, the mean width over all values of a sample;
            "joint" has the budget count activations of one sample like weights.
        activation_bits: widths that activations may have; by default 2 to 8.
        group: number of adjacent channels that share a width, with granularity "channel".
        pins: the widths that layers may have, by name pattern.
        layer_memory: largest size of one layer's weights, and of one activation of a sample.
        samples: training samples to measure on, over all ranks.
        allocation: an `Allocation`, or the path of one saved as JSON, to use instead of measuring for a budget.
        save_to: path of the JSON file to write; by default ``allocation.json`` in the Trainer's log folder, if the
            Trainer keeps anything (a logger, checkpoints).
        forward: called with the module and a batch, returns the output; by default as for `Quantize`.
        batch_dim: dimension of the inputs in which samples lie; by default it is found out.
        cross_terms: also count what widths lose together, from the same pass; pays with granularity "channel" and
            "model_fisher". On one rank.

    Afterwards ``allocated`` is the `Allocation` in force and ``sensitivity_table`` what was measured, if anything was.

    Example::

        Trainer(callbacks=[Quantize(4, 4), AllocateBits("10.66x"), FineTune()]).fit(module, datamodule)
    """

    def __init__(
        self,
        budget: Budget | Sequence[Budget] = "8x",
        sensitivity: str | Metric = "fisher",
        solver: str = "lagrangian",
        bits: Sequence[int] | None = None,
        granularity: Granularity = "layer",
        *,
        activations: float | Joint | None = None,
        activation_bits: Sequence[int] | None = None,
        group: int = 1,
        pins: Mapping[str, int | Sequence[int]] | None = None,
        layer_memory: str | float | None = None,
        samples: int = 512,
        allocation: Allocation | str | Path | None = None,
        save_to: str | Path | None = None,
        forward: Forward | None = None,
        batch_dim: int | None = None,
        cross_terms: bool = False,
    ) -> None:
        super().__init__()
        for one in budget if isinstance(budget, (list, tuple)) else [budget]:
            if one != "same":
                parse_budget(one)  # wrong arguments fail here, not after the data are loaded
        solver_of(solver)
        if samples < 1:
            raise SpecError(f"samples={samples}; sensitivity needs at least 1")
        metric_of(sensitivity)
        self.budget = budget
        self.sensitivity = sensitivity
        self.solver = solver
        self.bits = bits
        self.granularity: Granularity = granularity
        self.activations = activations
        self.activation_bits = activation_bits
        self.group = group
        self.pins = pins
        self.layer_memory = layer_memory
        self.samples = samples
        self.allocation = allocation
        self.save_to = save_to
        self.forward = forward
        self.batch_dim = batch_dim
        self.cross_terms = cross_terms

    @override
    def _begin(self) -> None:
        self.sensitivity_table: Sensitivity | None = None
        self.allocated: Allocation | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, allocate, write the widths and calibrate anew; nothing if a checkpoint brought the widths."""
        require_attached(pl_module, "AllocateBits")
        if self.allocated is not None and self.allocated.is_in(pl_module):
            return
        if needs_calibration(pl_module):
            raise StateError(
                "AllocateBits needs calibrated quantizers; list Quantize before it in Trainer(callbacks=[...])"
            )
        if self.allocation is None:
            if self.activations is not None and any(
                q.seen is None and q.calibrated for q in activation_quantizers(pl_module).values()
            ):
                self._calibrate(trainer, pl_module)  # their ranges came from a checkpoint, without the values behind
            with isolate_rng(), progress_of(trainer):
                allocation = self._allocate(trainer, pl_module)
        else:
            allocation = (
                self.allocation if isinstance(self.allocation, Allocation) else Allocation.load(self.allocation)
            )
        set_bits(pl_module, allocation.weights, allocation.activations)
        self._calibrate(trainer, pl_module)
        self.allocated = allocation
        self._report(trainer, pl_module, allocation)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The allocation, as JSON."""
        return {"allocation": None if self.allocated is None else self.allocated.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the allocation; the widths are in the module's own state."""
        super().load_state_dict(state_dict)
        saved = state_dict["allocation"]
        self.allocated = None if saved is None else Allocation.from_json(saved)

    def _calibrate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        calibrate_on_training_data(trainer, module, self.samples, self.forward)

    def _allocate(self, trainer: pl.Trainer, module: pl.LightningModule) -> Allocation:
        batches = training_batches(trainer, self.samples, "Measuring sensitivity")
        first = batches.peek()
        metric = metric_of(self.sensitivity)
        if hasattr(metric, "with_loss"):  # of `Metric`; others that measure come as they are
            metric = metric.with_loss(_loss_of(module, first))
        self.sensitivity_table = measure_sensitivity(
            module,
            batches,
            metric,
            group=self.group,
            activations=self.activations is not None,
            forward=forward_of(trainer, module, self.forward, autocast=False),
            reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
            batch_dim=self.batch_dim,
            cross_terms=self.cross_terms,
        )
        allocation = allocate(
            module,
            self.sensitivity_table,
            self._budgets(module),
            solver=self.solver,
            bits=self.bits,
            granularity=self.granularity,
            activations=self.activations,
            activation_bits=self.activation_bits,
            pins=self.pins,
            layer_memory=self.layer_memory,
            cross_terms=self.cross_terms,
        )
        return Allocation.from_json(
            trainer.strategy.broadcast(allocation.to_json())
        )  # the same on every rank, to the bit

    def _budgets(self, module: nn.Module) -> list[Any]:
        """The budgets, with a number for "same"."""
        budgets = self.budget if isinstance(self.budget, (list, tuple)) else [self.budget]
        return [f"{summary(module).bytes}B" if budget == "same" else budget for budget in budgets]

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule, allocation: Allocation) -> None:
        """Show, log and save what was allocated."""
        size = summary(module)
        rank_zero_info(f"Allocated: {allocation.table().notes[0]}. {type(module).__name__}: {size.total()}")
        self.numbers = {
            "allocation/average_bits": size.average_bits,
            "allocation/bytes": float(size.bytes),
            "allocation/expected_loss": allocation.loss,
        }
        path = report_path(trainer, "allocation.json", self.save_to)
        if path is not None:
            write_text(path, allocation.to_json())


def _loss_of(module: pl.LightningModule, batch: Any) -> Any:
    """How to compute the mean loss of a batch; None: from its labels."""
    own = getattr(module, "calibration_loss", None)
    if callable(own):
        return lambda _, batch: own(batch)
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point():
        return None

    def loss(model: nn.Module, batch: Any) -> Any:
        with quiet(module):
            result = call_step(module, batch)
        return result["loss"] if isinstance(result, Mapping) else result

    return loss
