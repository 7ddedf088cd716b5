r"""MLP reconstruction: ReLUs in the place of GELUs, and the linear layers around them fitted to what was there before.

With X what the first layer reads in the float network, f its GELU and Y = W2 f(W1 X) what the MLP gave, W1, b1, W2 and
b2 minimize ``|W2 r(W1 X) - Y|^2 + 2 |W2 min(r(W1 X), u) - Y|^2``, means over all elements, with r the ReLU and u a
quantile of the positive values of f. What the second layer reads is 0 and more then, and little beyond u matters, so
that a grid of few levels fits it better.

Found are all ``linear -> GELU -> linear`` in which one reads the other alone. The network is another one afterwards,
before anything is rounded, which costs some accuracy in float.

Source: Wu et al., APHQ-ViT, CVPR 2025, section 4.3: Adam with 4e-5, 20 000 iterations of 32 images; u at 98 to 99 %.
Deviates: the squared error instead of its own importance; the norm in front is not fitted; the rate grows for fewer
iterations, up to ten times.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.float_models import float_model
from lq.attachment.sites import float_weight
from lq.errors import DataError
from lq.quantizer.histogram import Reduce
from lq.reconstruction.mlp_fit import MLP, MLPFit, MLPOptions, MLPReport
from lq.reconstruction.options import Watch
from lq.reconstruction.storage import Storage, Stored, memory_in_bytes
from lq.structure.forward import Forward, run
from lq.structure.recomputation import without_recomputation
from lq.structure.tracing import Trace, Value, trace
from lq.tables import Table


@dataclass(frozen=True)
class MLPReconstruction:
    """All MLPs, and the GELUs that were left, with the reason."""

    mlps: tuple[MLPReport, ...]
    left: tuple[tuple[str, str], ...] = ()

    def table(self) -> Table:
        """Errors by MLP, ready to be shown."""
        rows = [(one.name, f"{one.before:.4g}", f"{one.after:.4g}", f"{one.limit:.3g}") for one in self.mlps]
        notes = [f"{len(rows)} GELUs are ReLUs now"] + [f"{name} is still a GELU: {why}" for name, why in self.left]
        return Table(("GELU", "error as ReLU", "error fitted", "clipped at"), tuple(rows), tuple(notes))

    def __str__(self) -> str:
        return str(self.table())


def reconstruct_mlps(
    model: nn.Module,
    batches: Iterable[Any],
    options: MLPOptions,
    *,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
    ranks: int = 1,
    watch: Watch = lambda steps, name: steps,
) -> MLPReconstruction:
    """Put ReLUs in the place of the GELUs of the MLPs of `model`, in place, and fit the layers around them.

    Args:
        model: a model, float or with quantizers, of which none rounds meanwhile; runs in eval mode.
        batches: any iterable of batches, read once; labels are not used.
        options: how.
        forward: called with the model and a batch; by default as in `lq.calibrate`.
        reduce: combines a tensor over ranks; each rank has its own batches.
        ranks: number of ranks.
        watch: wraps the steps of an MLP, given its name.

    Returns:
        What was done.

    Raises:
        DataError: if there are no batches.
        DivergenceError: if a weight is not a number in the end; the model is then as it was.
    """
    rest = iter(batches)
    head = list(itertools.islice(rest, 1))
    if not head:
        raise DataError("MLP reconstruction got no batches: the loader is empty; give at least one batch")
    with float_model(model), without_recomputation(model):
        with torch.no_grad():
            found, left = find_mlps(model, trace(model, lambda: run(model, head[0], forward), head[0]))
            every = itertools.chain(head, rest)
            inputs = _captured(model, found, every, lambda batch: run(model, batch, forward), options)
        mean = _mean_over(reduce, ranks)
        fits = [MLPFit(model, mlp, inputs[mlp], options, mean, ranks) for mlp in found]
        reports = tuple(fit.run(watch) for fit in fits)
    for fit in fits:
        fit.write()
    return MLPReconstruction(reports, tuple(left))


def find_mlps(model: nn.Module, seen: Trace) -> tuple[list[MLP], list[tuple[str, str]]]:
    """The MLPs of a model that was traced, and the GELUs that are no part of one, with the reason."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    mlps, left = [], []
    for name in dict.fromkeys(
        call.module for call in seen.calls if call.function == "gelu" and call.module is not None
    ):
        reads, gives = seen.inputs.get(name, []), seen.outputs.get(name, [])
        module = model.get_submodule(name)
        calls = [call for call in seen.calls if call.module == name]
        if any(module.children()) or any(module.parameters()) or len(calls) != len(reads):
            left.append((name or type(model).__name__, "it is called as a function"))
        elif len(reads) != 1 or gives[0] is None:
            left.append((name, "it is used several times"))
        else:
            mlp = _around(name, reads[0], gives[0], linears, seen)
            if mlp is None:
                left.append((name, "it does not stand between two linear layers that nothing else reads"))
            else:
                mlps.append(mlp)
    return mlps, left


def _around(name: str, read: Value, given: Value, linears: dict[str, nn.Linear], seen: Trace) -> MLP | None:
    """The MLP around a GELU; None if it stands between other layers, or others read what flows there."""
    first = [one for one in read.output_of if one in linears and len(seen.outputs[one]) == 1]
    second = [one for one in linears if seen.inputs.get(one) == [given]]
    if len(first) != 1 or len(second) != 1 or read.readers != ["gelu"] or given.readers != ["linear"]:
        return None
    weights = [float_weight(linears[one]) for one in (first[0], second[0])]
    shared = [p for p in weights if sum(float_weight(other) is p for other in linears.values()) > 1]
    return None if shared else MLP(first[0], name, second[0])


def _captured(
    model: nn.Module,
    mlps: Sequence[MLP],
    batches: Iterable[Any],
    run_on: Callable[[Any], Any],
    options: MLPOptions,
) -> dict[MLP, list[Stored]]:
    """What the first layer of each MLP reads, by batch."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    storage = Storage(device, memory_in_bytes(options.memory))
    kept: dict[MLP, list[Stored]] = {mlp: [] for mlp in mlps}

    def keep(mlp: MLP) -> Callable[..., None]:
        return lambda module, args, kwargs: kept[mlp].append(storage.keep(args[0] if args else kwargs["input"]))

    with ExitStack() as stack:
        for mlp in mlps:
            handle = model.get_submodule(mlp.first).register_forward_pre_hook(keep(mlp), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            run_on(batch)
    return kept


def _mean_over(reduce: Reduce | None, ranks: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor if reduce is None or ranks == 1 else reduce(tensor, "sum") / ranks
