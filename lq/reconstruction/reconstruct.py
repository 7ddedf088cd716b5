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

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lq.attachment.float_models import float_copy
from lq.attachment.padded import padded
from lq.attachment.sites import activation_quantizers, require_attached
from lq.calibration.calibration import needs_calibration
from lq.errors import DataError, SpecError, StateError
from lq.quantizer.histogram import Reduce
from lq.reconstruction.capture import Batches, Capture
from lq.reconstruction.drop import Drop, drop_of
from lq.reconstruction.engine import fit_unit, refit_ranges_if_better
from lq.reconstruction.fisher import squared_gradients
from lq.reconstruction.flow import Flow, find_flow
from lq.reconstruction.granularity import Merges, Metric, merge_units, module_capacity
from lq.reconstruction.heap import kept_memory
from lq.reconstruction.identity import describe_object, digest_of_module
from lq.reconstruction.losses import Loss, loss_of
from lq.reconstruction.method import Activations, Data, Inside, Method, Start
from lq.reconstruction.progress import Progress
from lq.reconstruction.quantizers import quantizers_of, tapped
from lq.reconstruction.report import Reconstruction, UnitReport
from lq.reconstruction.rounding import Rounding, rounding_of
from lq.reconstruction.storage import Storage, memory_in_bytes
from lq.reconstruction.units import Granularity, Unit, find_units
from lq.structure.batch_layout import FIRST, Layout, find_layout
from lq.structure.forward import Forward, eval_mode, run
from lq.structure.outputs import require_output
from lq.structure.recomputation import without_recomputation

#: Units by their granularity, or by name: modules, chains of them as lists.
Units = Granularity | Literal["mixed"] | Sequence[str | Sequence[str]]

#: Wraps the steps of a unit, given its name, to show them.
Watch = Callable[[Iterable[int], str], Iterable[int]]


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    units: Units = "block",
    rounding: str | Rounding = "adaround",
    start: Start = "float",
    loss: str | Loss = "relative",
    drop: float | str | Drop = 0.5,
    iterations: int = 20_000,
    batch_size: int = 32,
    activation_mode: Activations = "learned",
    step_lr: float | None = None,
    regularization: float = 0.0,
    bias_lr: float = 0.0,
    metric: Metric = "modcap",
    merges: int = 2,
    search_iterations: int = 200,
    early_stop: bool = False,
    compile: bool = False,
    memory: str | float = "4GB",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    teacher: nn.Module | None = None,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
    ranks: int = 1,
    rank: int = 0,
    watch: Watch = lambda steps, name: steps,
) -> Reconstruction:
    """Learn the rounding of the weights of `model`, and the steps of its activations, in place.

    Its float weights are overwritten by those of their levels. A unit whose loss, over all samples and with everything
    quantized, did not fall keeps nearest rounding. Weights that functions use, instead of layers, keep it too.

    Args:
        model: a model with quantizers, calibrated; runs in eval mode.
        batches: any iterable of batches, read once and kept; labels are not used.
        units: "layer", "block", "mixed" (MRECG: merged blocks), "network", or names of modules, chains as lists.
        rounding: "nearest", "adaround", "softmax" (NWQ), "wide_softmax" (also one level down: where weights are
            levels already), or a rounding object of `lq.reconstruction.rounding`.
        start: where the rounding starts: at the "float" weights, or nearer to what error "feedback" (GPTQ) chooses;
            with rounding "nearest", that is what they get.
        loss: "relative" (the squared error, of tokens relative to the variance of each), "mse" (the squared error as it
            is), "fisher" (BRECQ), "kl" (of logits: the network as one unit), or a function of output, target and
            weights, such as ``LpLoss(2.4)``.
        drop: probability that an element of an activation stays float: a number, "annealed" (NWQ), or a function of
            progress.
        iterations: optimizer steps for a unit.
        batch_size: samples in a step, over all ranks.
        activation_mode: while rounding is learned, activations are quantized by steps that are "learned" along, from
            ranges that fit those of the float network (or the steps they have, where the loss is less); "quantized" by
            the steps they have; or left "float", and quantized with ranges that fit those of the float network after.
        step_lr: learning rate of the logarithm of activation steps; falls to 0 as a cosine; None: by the number of
            iterations.
        regularization: weight of the squared differences of block outputs inside of a unit (NWQ).
        bias_lr: learning rate of the layers' biases; 0: they stay.
        metric: what mixed units are chosen by: "modcap" (without data) or "loss" (a short reconstruction).
        merges: pairs of blocks that mixed units merge.
        search_iterations: steps for a block of that short reconstruction.
        early_stop: end a unit when its loss falls no further and the rounding is decided.
        compile: run units through ``torch.compile``: the same losses, after seconds of compiling for each unit, which
            only pay with many iterations or large units (ResNet-20, 100 iterations on a CPU: 118 seconds, 22 without).
        memory: limit for captured activations on the device, and once more in host memory; the rest goes to files.
        dtype: what captured activations are kept as; None: as they are.
        seed: of the order of samples and of drops; the caller's random state is left alone.
        resume: file that keeps finished units; if it exists, the run goes on after the last of them.
        teacher: the float model; by default a copy of `model` without quantizers.
        forward: called with the model and a batch; by default as in `lq.calibrate`.
        reduce: combines a tensor over ranks: called with it and "sum", "min" or "max". Each rank has its own batches.
        ranks: number of ranks that `reduce` combines.
        rank: which of them this is; the first one writes.
        watch: wraps the steps of a unit, given its name.

    Returns:
        What was done: loss of every unit before and after, curves, merges.

    Raises:
        StateError: if the model has no quantizers or was not calibrated, or `resume` belongs to another run.
        DataError: if there are no batches, or samples cannot be told apart in a unit's tensors.
        SpecError: for a choice that does not exist.
        DivergenceError: if a loss is not a number in the end.

    >>> import lq
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
    check_choices(
        units=units,
        metric=metric,
        activation_mode=activation_mode,
        start=start,
        iterations=iterations,
        search_iterations=search_iterations,
        batch_size=batch_size,
        merges=merges,
        step_lr=step_lr,
        bias_lr=bias_lr,
        regularization=regularization,
    )
    if batch_size % ranks:
        raise SpecError(f"batch_size={batch_size} cannot be shared by {ranks} ranks; give a multiple of their number")
    method = Method(
        rounding=rounding_of(rounding),
        loss=loss_of(loss),
        drop=drop_of(drop),
        iterations=iterations,
        batch_size=batch_size,
        activation_mode=activation_mode,
        step_lr=step_lr,
        early_stop=early_stop,
        compile=compile,
        regularization=regularization,
        bias_lr=bias_lr,
        start=start,
    )
    storage = Storage(_device(model), memory_in_bytes(memory))
    twin = float_copy(model) if teacher is None else teacher
    source = iter(batches)
    first = list(itertools.islice(source, 1))
    if not first:
        raise DataError("reconstruction got no batches: the loader is empty; give lq.reconstruct at least one batch")
    layout = _layout(twin, first[0], forward)
    data = Batches(itertools.chain(first, source), storage, digest=resume is not None, layout=layout)
    work = _Work(model, twin, data, forward, storage, dtype, reduce, ranks, seed)
    with work.ready(activation_mode):
        cut = work.units("block" if units == "mixed" else units)
        merged = None
        if units == "mixed":
            cut, merged = work.merged(cut, metric, merges, replace(method, iterations=search_iterations), watch)
        progress = Progress.none() if resume is None else work.progress(resume, cut, method, rank)
        return Reconstruction(tuple(work.run(cut, method, watch, progress)), merged)


def check_choices(
    *,
    units: Units,
    metric: Metric,
    activation_mode: Activations,
    start: Start,
    step_lr: float | None,
    bias_lr: float,
    regularization: float,
    **counts: int,
) -> None:
    """Raise a `SpecError` for arguments of `reconstruct` that do not exist; `counts` have to be at least 1."""
    chosen = (
        ("units", units, ("layer", "block", "mixed", "network")),
        ("metric", metric, get_args(Metric)),
        ("activation_mode", activation_mode, get_args(Activations)),
        ("start", start, get_args(Start)),
    )
    for name, value, choices in chosen:
        if (isinstance(value, str) and value not in choices) or not isinstance(value, (str, Sequence)):
            more = ", or a list of module names" if name == "units" else ""
            raise SpecError(f"{name}={value!r} is unknown; use one of {choices}{more}")
    for name, count in counts.items():
        if count < 1:
            raise SpecError(f"{name}={count} must be at least 1")
    if (step_lr is not None and step_lr <= 0) or regularization < 0 or bias_lr < 0:
        raise SpecError(
            f"step_lr={step_lr} must be positive, regularization={regularization} and bias_lr={bias_lr} not negative"
        )


class _Work:
    """A model, its float copy and the data: what all units have in common."""

    def __init__(
        self,
        model: nn.Module,
        twin: nn.Module,
        data: Batches,
        forward: Forward | None,
        storage: Storage,
        dtype: torch.dtype | None,
        reduce: Reduce | None,
        ranks: int,
        seed: int,
    ) -> None:
        self.model = model
        self.twin = twin
        self.data = data
        self.forward = forward
        self.storage = storage
        self.dtype = dtype
        self.reduce = reduce
        self.ranks = ranks
        self.seed = seed
        self.example = data.example(2)

    def forward_on(self, model: nn.Module, batch: Any) -> Any:
        """Run either model on a batch."""
        return run(model, batch, self.forward)

    @contextmanager
    def ready(self, activations: Activations) -> Iterator[None]:
        """Eval mode, no gradients for the model's own parameters, activations quantized or not."""
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with (
            eval_mode(self.model),
            eval_mode(self.twin),
            kept_memory(self.storage.device),
            without_recomputation(self.model, self.twin),
            padded(self.model, self.twin),
            torch.compiler.set_stance("force_eager"),
            ExitStack() as stack,
        ):
            for part in activation_quantizers(self.model).values() if activations == "float" else ():
                stack.enter_context(tapped(part, lambda x: x))
            try:
                for parameter in wanted:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in wanted:
                    parameter.requires_grad_(True)

    def units(self, units: Granularity | Sequence[str | Sequence[str]]) -> list[Unit]:
        """The model, cut."""
        with torch.no_grad():
            run_twin = lambda: self.forward_on(self.twin, self.example)  # noqa: E731
            return find_units(self.model, self.twin, units, run_twin, self.example)

    def flow(self, units: Sequence[Unit]) -> Flow:
        """How tensors come from one unit to the next."""
        return find_flow(self.twin, units, self.forward_on, self.example, 2, self.data.layout.dim)

    def merged(
        self, blocks: Sequence[Unit], metric: Metric, count: int, method: Method, watch: Watch
    ) -> tuple[list[Unit], Merges]:
        """MRECG's units."""
        if metric == "modcap":
            scores = [module_capacity(unit.bind(self.model)) for unit in blocks]
        else:
            before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            searched = self.run(blocks, method, lambda steps, name: watch(steps, f"{name} (search)"), Progress.none())
            scores = [found.after for found in searched]
            self.model.load_state_dict(before)
        return merge_units(blocks, self.flow(blocks), scores, count, metric)

    def run(self, units: Sequence[Unit], method: Method, watch: Watch, progress: Progress) -> Iterator[UnitReport]:
        """Fit one unit after the other; those that `progress` has are taken from there."""
        flow = self.flow(units)
        streams = [
            Capture(m, units, flow, self.forward_on, self.data, self.storage, self.dtype, method.batch_size)
            for m in (self.model, self.twin)
        ]
        quantized, whole = streams
        weights = None
        if getattr(method.loss, "weighted", False):
            weights = squared_gradients(
                self.twin,
                units,
                flow,
                self.forward_on,
                self.data,
                self.storage,
                self.dtype,
                self.seed,
                self.reduce,
                self.ranks,
            )
        blocks = self.units("block") if method.regularization else []
        for k, (unit, quantizers) in enumerate(zip(units, quantizers_of(self.model, units), strict=True)):
            begin = time.perf_counter()
            modules = unit.bind(self.model)
            inputs, float_inputs = quantized.inputs(k), whole.inputs(k)
            targets = whole.finish(k, float_inputs)
            report = progress.restored(k)
            if report is None:
                data = Data(inputs, float_inputs, targets, None if weights is None else weights[k])
                before = None
                if method.activation_mode != "quantized":
                    before = refit_ranges_if_better(
                        modules, quantizers, data, method, self.data.samples, self.reduce, self.ranks
                    )
                fitted = fit_unit(
                    modules,
                    quantizers,
                    data,
                    method,
                    samples=self.data.samples,
                    seed=self.seed * 100_003 + k,
                    before=before,
                    inside=self._inside(unit, blocks) if blocks else None,
                    reduce=self.reduce,
                    ranks=self.ranks,
                    progress=partial(_named, watch, unit.name),
                )
                seconds = time.perf_counter() - begin
                report = UnitReport(unit.name, fitted.before, fitted.after, fitted.curve, fitted.iterations, seconds)
                progress.keep(report, quantizers)
            quantized.pass_on(k, inputs)
            yield report

    def _inside(self, unit: Unit, parts: Sequence[Unit]) -> Inside | None:
        """Those of the `parts` of the network that lie inside of a unit."""
        parts = [part for part in parts if part.modules != unit.modules]
        inside = [p.modules[-1] for p in parts if any(_is_inside(p.modules[0], module) for module in unit.modules)]
        pairs = [(self.model.get_submodule(name), self.twin.get_submodule(name)) for name in inside]
        return Inside(unit.bind(self.twin), pairs) if pairs else None

    def progress(self, path: str | Path, units: Sequence[Unit], method: Method, rank: int) -> Progress:
        """The file of finished units, and what has to be the same for a run to go on where another one ended."""
        fingerprint = {
            "units": [unit.name for unit in units],
            "method": describe_object(method),
            "samples": self.data.samples,
            "data": self._over_ranks(self.data.digest, rank),
            "seed": self.seed,
            "ranks": self.ranks,
            "dtype": str(self.dtype),
            "forward": describe_object(self.forward),
            "model": digest_of_module(self.model),
            "teacher": digest_of_module(self.twin),
        }
        return Progress.open(
            path, self.model, fingerprint, quantizers_of(self.model, units), self.reduce, writes=rank == 0
        )

    def _over_ranks(self, digest: str, rank: int) -> str:
        """One hash of those of all ranks, which depends on their order."""
        if self.reduce is None or self.ranks == 1:
            return digest
        parts = torch.tensor([float(int(digest[i : i + 4], 16)) for i in range(0, len(digest), 4)])
        found = self.reduce((parts * (rank + 1)).to(self.storage.device), "sum")
        return "".join(f"{round(part):06x}" for part in found.tolist())


def _layout(model: nn.Module, batch: Any, forward: Forward | None) -> Layout:
    """Where samples lie in batches, told by the output of the float model; in the first dimension if it has none."""
    with eval_mode(model), without_recomputation(model), torch.no_grad(), torch.random.fork_rng():
        output = run(model, batch, forward)
        if not isinstance(output, Tensor) or not output.ndim:
            return FIRST
        return find_layout(batch, lambda part: require_output(run(model, part, forward)))


def without_address(thing: object) -> str:
    """What an object is, the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(thing))


def _named(watch: Watch, name: str, steps: Iterable[int]) -> Iterable[int]:
    return watch(steps, name)


def _is_inside(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(f"{module}.")


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
