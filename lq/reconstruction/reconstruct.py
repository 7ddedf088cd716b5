"""`reconstruct`: fit the quantized network to the float one, unit by unit.

For each unit in the order they run: capture its inputs in the network quantized so far and its float targets, learn the
rounding of its weights and the steps of its activations, write them into the model. AdaRound, BRECQ, QDrop, MRECG,
NWQ and others are choices of its arguments:

==========  =========  ============  ==========  ===============  ==========================================
method      units      rounding      drop        activation_mode  loss
==========  =========  ============  ==========  ===============  ==========================================
AdaRound    "layer"    "adaround"    0           "float"          "mse"
BRECQ       "block"    "adaround"    0           "float"          "mse" (its code) or "fisher" (its paper)
QDrop       "block"    "adaround"    0.5         "learned"        "mse"
MRECG       "mixed"    "adaround"    0.5         "learned"        "mse"
NWQ         "network"  "softmax"     "annealed"  "learned"        "mse", regularization=1
APHQ-ViT    "block"    "adaround"    0.5         "learned"        "aph" (after MLP reconstruction)
FIMA-Q      "block"    "adaround"    0.5         "learned"        "dplr"
GLF-Q       "block"    "ste"         0           "learned"        "global"
==========  =========  ============  ==========  ===============  ==========================================
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lq.attachment.sites import require_attached
from lq.bars import Iterations, steps
from lq.calibration.calibration import needs_calibration
from lq.errors import SpecError, StateError
from lq.options import takes
from lq.reconstruction.behind import Behind, NetworkEnds, is_inside, network_ends
from lq.reconstruction.capture import Capture
from lq.reconstruction.engine import fit_unit
from lq.reconstruction.fingerprint import fingerprint_of
from lq.reconstruction.fisher import squared_gradients
from lq.reconstruction.granularity import Merges, merge_units, module_capacity
from lq.reconstruction.networks import Networks
from lq.reconstruction.objective import NetworkLoss, Objective
from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import InnerOutputs, Problem
from lq.reconstruction.progress import Progress
from lq.reconstruction.quantizers import UnitQuantizers, quantizers_of
from lq.reconstruction.ranges import refit_ranges_if_better
from lq.reconstruction.report import Reconstruction, UnitReport
from lq.reconstruction.time_limit import TimeLimit
from lq.reconstruction.units import Unit

# Iterations that give most of what more of them give (docs/results.md), to say what they would take.
_FEWER = 2000


@takes(RunOptions, keyword_only=True)
def reconstruct(model: nn.Module, batches: Iterable[Any], options: RunOptions) -> Reconstruction:
    """Learn the rounding of the weights of `model`, and the steps of its activations, in place.

    Its float weights are overwritten by those of their levels. A unit whose loss, over all samples and with everything
    quantized, did not fall keeps nearest rounding. So do weights that functions use, instead of layers, outside of all
    units, or in several calls.

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
        minutes=None,
        watch=lambda steps, name: options.watch(steps, f"{name} (search)"),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantizers = quantizers_of(networks.quantized, blocks)
    reports = _fit_units(networks, blocks, quantizers, search, Progress.none(), "Choosing units")
    losses = [report.after for report in reports]
    model.load_state_dict(before)
    return losses


def _fit_units(
    networks: Networks,
    units: Sequence[Unit],
    quantizers: Sequence[UnitQuantizers],
    options: RunOptions,
    progress: Progress,
    title: str = "Reconstructing",
) -> Iterator[UnitReport]:
    """Fit one unit after the other; those that `progress` has are taken from there."""
    costs = [
        0.0 if k < progress.finished else cost
        for k, cost in enumerate(_costs(quantizers, options.batch_size // options.ranks))
    ]
    limit = TimeLimit(options, costs)
    quantized, floats = networks.captures(units)
    weighted = getattr(options.loss_function, "weighted", False)
    weights = squared_gradients(floats, options) if weighted else [None] * len(units)
    ends = _network_ends(networks, floats, options)
    blocks = networks.units("block") if options.regularization else []
    each = Iterations(options.iterations, _FEWER) if options.minutes is None else None
    shown = steps(units, title, unit="unit", name=lambda unit: unit.name, costs=costs, iterations=each)
    for k, unit in enumerate(shown):
        begin = time.perf_counter()
        inputs, float_inputs = quantized.inputs(k), floats.inputs(k)
        targets = floats.finish(k, float_inputs)
        report = progress.restored(k)
        if report is None:
            inner = _inner_outputs(networks, unit, blocks)
            problem = Problem(
                unit.name, unit.bind(networks.model), quantizers[k], inputs, float_inputs, targets, weights[k], inner
            )
            problem.float_modules = unit.bind(networks.float_model)
            if ends is not None:
                problem.objective = _begin(Behind(floats, k, targets, ends, options), problem)
            before = None if options.activation_mode == "quantized" else refit_ranges_if_better(problem, options)
            own = replace(options, iterations=limit.iterations(k, problem))
            solution = fit_unit(problem, own, seed=options.seed * 100_003 + k, before=before)
            report = UnitReport(unit.name, **vars(solution), seconds=time.perf_counter() - begin)
            progress.keep(report, quantizers[k])
        quantized.pass_on(k, inputs)
        yield report


def _network_ends(networks: Networks, floats: Capture, options: RunOptions) -> NetworkEnds | None:
    """What the float network ends with, for losses that look at it; None: the loss looks at units alone."""
    loss = options.loss_function
    if not isinstance(loss, NetworkLoss):
        return None
    ends = network_ends(floats, networks.example, features=loss.of_features)
    for unit in floats.units if loss.of_features else ():
        layers = networks.quantized.layers_in(unit.bind(networks.model))
        if len(layers) > 1 and any(is_inside(ends.head, module) for module in unit.modules):
            raise SpecError(
                f"loss={options.loss!r} compares what the last layer, {ends.head!r}, reads, which lies inside of unit "
                f"{unit.name}; use units='block' or 'layer', or name units so that the last layer is one of its own "
                "(or, for the network as one unit, loss='kl')"
            )
    return ends


def _begin(behind: Behind, problem: Problem) -> Objective:
    """The objective of a unit, which has looked at it."""
    loss = behind.options.loss_function
    if not isinstance(loss, NetworkLoss):
        raise StateError(f"{loss!r} does not look at the network")
    objective = loss.begin(behind)
    objective.begin(partial(problem.passes, behind.options))
    return objective


def _costs(quantizers: Sequence[UnitQuantizers], samples: int) -> list[float]:
    """About what a step on so many samples costs for each unit, in multiplications: those that it has, and its weights.

    Measured on one core of a CPU (ResNet-18, MobileNet-V2): learning the rounding takes 80 ns a weight, as long as 400
    multiplications forward and backward.
    """
    found = []
    for unit in quantizers:
        macs = sum(quantizer.macs or 0.0 for quantizer, _ in unit.weights)
        found.append(samples * macs + 400 * sum(weight.numel() for _, weight in unit.weights))
    least = sum(found) / len(found) / 20  # what else is done
    return [count + least for count in found] if least else [1.0] * len(found)


def _inner_outputs(networks: Networks, unit: Unit, blocks: Sequence[Unit]) -> InnerOutputs | None:
    """The outputs of those of the `blocks` of the network that lie inside of a unit; None if there are none."""
    parts = [block for block in blocks if block.modules != unit.modules]
    inside = [p.modules[-1] for p in parts if any(is_inside(p.modules[0], module) for module in unit.modules)]
    pairs = [(networks.model.get_submodule(name), networks.float_model.get_submodule(name)) for name in inside]
    return InnerOutputs(unit.bind(networks.float_model), pairs) if pairs else None
