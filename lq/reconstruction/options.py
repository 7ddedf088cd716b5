"""The options of reconstruction, each written once: its name, type, default, text and check.

`lq.reconstruct` and `lq.callbacks.Reconstruct` show them as arguments (`lq.options.takes`) and hand them on as a whole.
An option that is added to `Options` is an argument of both, stands in ``--help`` with its text and may be set in
recipes; a file of `resume` belongs to runs with the same value of it.
"""

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from lq.errors import SpecError
from lq.quantizer.histogram import Reduce
from lq.reconstruction.drop import Drop, drop_of
from lq.reconstruction.granularity import Metric
from lq.reconstruction.losses import Loss, loss_of
from lq.reconstruction.rounding import Rounding, rounding_of
from lq.reconstruction.storage import dtype_of, memory_in_bytes
from lq.reconstruction.units import Granularity
from lq.structure.forward import Forward

#: Units by their granularity, or by name: modules, chains of them as lists.
Units = Granularity | Literal["mixed"] | Sequence[str | Sequence[str]]

#: Where the rounding starts: at the float weights, or nearer to what error feedback chooses.
Start = Literal["float", "feedback"]

#: What becomes of the activations of a unit while it is fitted.
Activations = Literal["learned", "quantized", "float"]

#: Wraps the steps of a unit, given its name, to show them.
Watch = Callable[[Iterable[int], str], Iterable[int]]

_UNITS = (*get_args(Granularity), "mixed")

#: Metadata of an option whose least value is 1.
AT_LEAST_1 = {"least": 1}

#: Metadata of an option of which files of `resume` say nothing: what comes out does not depend on it, or the file has
#: what it decides.
NOT_COMPARED = {"compared": False}


@dataclass(frozen=True)
class Options:
    """How a network is reconstructed: what the function and the callback have in common.

    Args:
        units: "layer", "block", "mixed" (MRECG: merged blocks), "network", or names of modules, chains as lists.
        rounding: "nearest", "adaround", "softmax" (NWQ), "wide_softmax" (also one level down: where weights are
            levels already), "ste" (GLF-Q: the weights themselves, straight through the rounding), or a rounding object
            of `lq.reconstruction.rounding`.
        start: where the rounding starts: at the "float" weights, or nearer to what error "feedback" (GPTQ) chooses;
            with rounding "nearest", that is what they get.
        loss: "relative" (the squared error, of tokens relative to the variance of each), "mse" (the squared error as it
            is), "fisher" (BRECQ), "kl" (of logits: the network as one unit), or a function of output, target and
            weights, such as ``LpLoss(2.4)``. Of the network behind the unit: "aph" (APHQ-ViT: errors weighed by the
            curvature of its divergence), "dplr" (FIMA-Q: by its gradients), "global" (GLF-Q: error of its last features
            too, for which it runs in each step).
        drop: probability that an element of an activation stays float: a number, "annealed" (NWQ), or a function of
            progress.
        iterations: optimizer steps for a unit.
        minutes: for all units together, about: each gets as many iterations, at most `iterations`, as the time that is
            left allows by the speed that was measured; their numbers, which the report has, differ from run to run.
        batch_size: samples in a step, over all ranks.
        activation_mode: while rounding is learned, activations are quantized by steps that are "learned" along, from
            ranges that fit those of the float network (or the steps they have, where the loss is less); "quantized" by
            the steps they have; or left "float", and quantized with ranges that fit those of the float network after.
        step_lr: learning rate of the logarithm of activation steps; falls to 0 as a cosine; None: by the number of
            iterations.
        over_first: divide the loss of a unit by its value before, and the differences inside by theirs, so that the
            penalty of the rounding and `regularization` weigh the same in all units.
        regularization: weight of the squared differences of block outputs inside of a unit (NWQ).
        bias_lr: learning rate of the layers' biases; falls to 0 as a cosine; 0: they stay.
        metric: what mixed units are chosen by: "modcap" (without data) or "loss" (a short reconstruction).
        merges: pairs of blocks that mixed units merge.
        search_iterations: steps for a block of that short reconstruction.
        early_stop: end a unit when its loss falls no further and the rounding is decided.
        compile: run units through ``torch.compile``: the same losses, after seconds of compiling for each unit, which
            only pay with many iterations or large units (ResNet-20, 100 iterations on a CPU: 118 seconds, 22 without).
        memory: limit for captured activations on the device, and once more in host memory; the rest goes to files.
        dtype: what captured activations are kept as, such as "float16"; None: as they are.
        seed: of the order of samples and of drops; the caller's random state is left alone.
        resume: file that keeps finished units; if it exists, the run goes on after the last of them.
    """

    units: Units = field(default="block", metadata=NOT_COMPARED)
    rounding: str | Rounding = "adaround"
    start: Start = field(default="float", kw_only=True)
    loss: str | Loss = "relative"
    drop: float | str | Drop = 0.5
    iterations: int = field(default=20_000, metadata=AT_LEAST_1)
    _: KW_ONLY
    minutes: float | None = field(default=None, metadata=NOT_COMPARED)
    batch_size: int = field(default=32, metadata=AT_LEAST_1)
    activation_mode: Activations = "learned"
    step_lr: float | None = None
    over_first: bool = False
    regularization: float = 0.0
    bias_lr: float = 0.0
    metric: Metric = field(default="modcap", metadata=NOT_COMPARED)
    merges: int = field(default=2, metadata=AT_LEAST_1 | NOT_COMPARED)
    search_iterations: int = field(default=200, metadata=AT_LEAST_1 | NOT_COMPARED)
    early_stop: bool = False
    compile: bool = False
    memory: str | float = field(default="4GB", metadata=NOT_COMPARED)
    dtype: str | torch.dtype | None = field(default=None, metadata=NOT_COMPARED)
    seed: int = field(default=0, metadata=NOT_COMPARED)
    resume: str | Path | None = field(default=None, metadata=NOT_COMPARED)

    def __post_init__(self) -> None:
        _ = self.rounding_method, self.loss_function, self.drop_schedule, self.memory_limit, self.kept_dtype
        if self.units not in _UNITS if isinstance(self.units, str) else not isinstance(self.units, Sequence):
            raise SpecError(f"units={self.units!r} is unknown; use one of {_UNITS}, or a list of module names")
        types = typing.get_type_hints(type(self))
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata.get("least")
            if get_origin(types[one.name]) is Literal and value not in get_args(types[one.name]):
                raise SpecError(f"{one.name}={value!r} is unknown; use one of {get_args(types[one.name])}")
            if least is not None and value < least:
                raise SpecError(f"{one.name}={value} must be at least {least}")
        if self.minutes is not None and not self.minutes > 0:
            raise SpecError(f"minutes={self.minutes} must be positive; None for all iterations")
        if (self.step_lr is not None and self.step_lr <= 0) or self.regularization < 0 or self.bias_lr < 0:
            raise SpecError(
                f"step_lr={self.step_lr} must be positive, regularization={self.regularization} and "
                f"bias_lr={self.bias_lr} not negative"
            )

    def shared(self) -> dict[str, Any]:
        """The options that function and callback have in common, by name."""
        return {one.name: getattr(self, one.name) for one in fields(Options)}

    @cached_property
    def rounding_method(self) -> Rounding:
        """The rounding itself."""
        return rounding_of(self.rounding)

    @cached_property
    def loss_function(self) -> Loss:
        """The loss itself."""
        return loss_of(self.loss)

    @cached_property
    def drop_schedule(self) -> Drop:
        """The probability to drop, by the share of the iterations that are done."""
        return drop_of(self.drop)

    @cached_property
    def memory_limit(self) -> int:
        """The limit of memory in bytes."""
        return memory_in_bytes(self.memory)

    @cached_property
    def kept_dtype(self) -> torch.dtype | None:
        """The type itself that captured activations are kept as."""
        return dtype_of(self.dtype)

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the rounding and of the logarithms of steps, for Adam.

        What is learned has to go a certain way in however many steps there are. Published is 1e-3 for the rounding (and
        4e-5 for steps themselves, QDrop), for 20 000 iterations (2e-5, 2e-4 and 3 000 for weights themselves, "ste").
        Deviates: for fewer, both are larger, up to ten times for a tenth; on ResNet-20 at W2A2, 400 iterations with
        1e-2 do what 2 000 with 1e-3 do.
        """
        published = self.rounding_method.rates
        share = min(max(published.iterations / self.iterations, 1.0), 10.0)
        lr, step_lr = self.rounding_method.lr, self.step_lr
        return (
            published.rounding * share if lr is None else lr,
            published.steps * share if step_lr is None else step_lr,
        )


@dataclass(frozen=True)
class RunOptions(Options):
    """`Options`, and what a run of the function is given besides.

    Args:
        teacher: the float model; by default a copy of `model` without quantizers.
        forward: called with the model and a batch; by default as in `lq.calibrate`.
        reduce: combines a tensor over ranks: called with it and "sum", "min" or "max". Each rank has its own batches.
        ranks: number of ranks that `reduce` combines.
        rank: which of them this is; the first one writes.
        watch: wraps the steps of a unit, given its name.
    """

    _: KW_ONLY
    teacher: nn.Module | None = None
    forward: Forward | None = None
    reduce: Reduce | None = None
    ranks: int = field(default=1, metadata=AT_LEAST_1)
    rank: int = 0
    watch: Watch = lambda steps, name: steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.ranks:
            raise SpecError(
                f"batch_size={self.batch_size} cannot be shared by {self.ranks} ranks; give a multiple of their number"
            )

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """The mean of what each rank has."""
        if self.reduce is None or self.ranks == 1:
            return tensor
        return self.reduce(tensor, "sum") / self.ranks
