"""`reconstruct`: fit the quantized network to the float one, unit by unit.

For each unit in the order they run: capture its inputs in the network quantized so far and its float targets, learn the
rounding of its weights and the steps of its activations, write them into the model. AdaRound, BRECQ, QDrop, MRECG and
NWQ are choices of its arguments:

==========  =========  ============  ==========  ===============  ==========================================
method      units      rounding      drop        activation_mode  loss
==========  =========  ============  ==========  ===============  ==========================================
AdaRound    "layer"    "adaround"    0           "float"          "mse"
BRECQ       "block"    "adaround"    0           "float"          "mse" (its code) or "fisher" (its paper)
QDrop       "block"    "adaround"    0.5         "learned"        "mse"
MRECG       "mixed"    "adaround"    0.5         "learned"        "mse"
NWQ         "network"  "softmax"     "annealed"  "learned"        "mse", regularization=1
==========  =========  ============  ==========  ===============  ==========================================
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lq.attachment.sites import require_attached
from lq.calibration.calibration import needs_calibration
from lq.errors import StateError
from lq.options import takes
from lq.reconstruction.engine import fit_unit
from lq.reconstruction.fingerprint import fingerprint_of
from lq.reconstruction.fisher import squared_gradients
from lq.reconstruction.granularity import Merges, merge_units, module_capacity
from lq.reconstruction.networks import Networks
from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import InnerOutputs, Problem
from lq.reconstruction.progress import Progress
from lq.reconstruction.quantizers import UnitQuantizers, quantizers_of
from lq.reconstruction.ranges import refit_ranges_if_better
from lq.reconstruction.report import Reconstruction, UnitReport
from lq.reconstruction.units import Unit


@takes(RunOptions, keyword_only=True)
def reconstruct(model: nn.Module, batches: Iterable[Any], options: RunOptions) -> Reconstruction:
    """Learn the rounding of the weights of `model`, and the steps of its activations, in place.

    Its float weights are overwritten by those of their levels. A unit whose loss, over all samples and with everything
    quantized, did not fall keeps nearest rounding. Weights that functions use, instead of layers, keep it too.

    Args:
        model: a model with quantizers, calibrated; runs in eval mode.
        batches: any iterable of batches, read once and kept; labels are not used.
        options: each of `RunOptions` is an argument.

    Returns:
        What was done: loss of every unit before and after, curves, merges.

    Raises:
        StateError: if the model has no quantizers or was not calibrated, or `resume` belongs to another run.
        DataError: if there are no batches, or samples cannot be told apart in a unit's tensors.
        SpecError: for a choice that does not exist.
        DivergenceError: if a loss is not a number in the end.

    >>> import torch, lq
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = [torch.randn(64, 8)]
    >>> model = lq.calibrate(lq.attach(model, weights=2, activations=4, first_last=None), data)
    >>> found = reconstruct(model, data, units="layer", iterations=100)
    >>> all(unit.after <= unit.before for unit in found.units)
    True
    """
    require_attached(model, "lq.reconstruct")
    if needs_calibration(model):
        raise StateError("lq.reconstruct needs calibrated quantizers; run lq.calibrate(model, batches) first")
    networks = Networks(model, batches, options)
    with networks.ready():
        units, merges = networks.units("block" if options.units == "mixed" else options.units), None
        if options.units == "mixed":
            units, merges = _merged(networks, units)
        quantizers = quantizers_of(networks.quantized, units)
        progress = Progress.none()
        if options.resume is not None:
            progress = Progress.open(options.resume, model, fingerprint_of(networks, units), quantizers, options)
        reports = tuple(_fit_units(networks, units, quantizers, options, progress))
    return Reconstruction(reports, merges)


def _merged(networks: Networks, blocks: Sequence[Unit]) -> tuple[list[Unit], Merges]:
    """MRECG's units: the blocks, some of them merged."""
    options, model = networks.options, networks.model
    if options.metric == "modcap":
        scores = [module_capacity(networks.quantized.layers_in(unit.bind(model))) for unit in blocks]
    else:
        scores = _losses_of_search(networks, blocks)
    return merge_units(blocks, networks.flow(blocks), scores, options.merges, options.metric)


def _losses_of_search(networks: Networks, blocks: Sequence[Unit]) -> list[float]:
    """Losses of blocks after a short reconstruction; the model is then what it was before."""
    options, model = networks.options, networks.model
    search = replace(
        options,
        iterations=options.search_iterations,
        watch=lambda steps, name: options.watch(steps, f"{name} (search)"),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reports = _fit_units(networks, blocks, quantizers_of(networks.quantized, blocks), search, Progress.none())
    losses = [report.after for report in reports]
    model.load_state_dict(before)
    return losses


def _fit_units(
    networks: Networks,
    units: Sequence[Unit],
    quantizers: Sequence[UnitQuantizers],
    options: RunOptions,
    progress: Progress,
) -> Iterator[UnitReport]:
    """Fit one unit after the other; those that `progress` has are taken from there."""
    quantized, floats = networks.captures(units)
    weighted = getattr(options.loss_function, "weighted", False)
    weights = squared_gradients(floats, options) if weighted else [None] * len(units)
    blocks = networks.units("block") if options.regularization else []
    for k, unit in enumerate(units):
        begin = time.perf_counter()
        inputs, float_inputs = quantized.inputs(k), floats.inputs(k)
        targets = floats.finish(k, float_inputs)
        report = progress.restored(k)
        if report is None:
            inner = _inner_outputs(networks, unit, blocks)
            problem = Problem(
                unit.name, unit.bind(networks.model), quantizers[k], inputs, float_inputs, targets, weights[k], inner
            )
            before = None if options.activation_mode == "quantized" else refit_ranges_if_better(problem, options)
            solution = fit_unit(problem, options, seed=options.seed * 100_003 + k, before=before)
            report = UnitReport(unit.name, **vars(solution), seconds=time.perf_counter() - begin)
            progress.keep(report, quantizers[k])
        quantized.pass_on(k, inputs)
        yield report


def _inner_outputs(networks: Networks, unit: Unit, blocks: Sequence[Unit]) -> InnerOutputs | None:
    """The outputs of those of the `blocks` of the network that lie inside of a unit; None if there are none."""
    parts = [block for block in blocks if block.modules != unit.modules]
    inside = [p.modules[-1] for p in parts if any(_is_inside(p.modules[0], module) for module in unit.modules)]
    pairs = [(networks.model.get_submodule(name), networks.float_model.get_submodule(name)) for name in inside]
    return InnerOutputs(unit.bind(networks.float_model), pairs) if pairs else None


def _is_inside(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(f"{module}.")
