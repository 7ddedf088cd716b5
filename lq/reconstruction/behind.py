"""The float network behind a unit: what its logits and its last features become with another output of the unit.

Losses that see further than the unit's own output ask it. Units up to this one do not compute: what later code reads of
them is what the float network has kept, as in `lq.reconstruction.capture`. Where that does not give the logits back
(code behind the last unit that reads an early one), they do compute, and the unit's output alone is replaced.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.attachment.sites import layers
from lq.errors import DataError
from lq.reconstruction.capture import Capture, Outputs
from lq.reconstruction.flow import layout_of
from lq.reconstruction.options import RunOptions
from lq.reconstruction.partial_runs import replaced, returning
from lq.structure.outputs import require_output
from lq.structure.samples import take

# How far logits may be from those of a plain run, relative to the largest: rounding is below.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 2e-2


class Ends(NamedTuple):
    """What a run of the network ends with: its logits, and what its last layer reads, if that depends on the unit."""

    logits: Tensor
    features: Tensor | None


@dataclass
class NetworkEnds:
    """What the float network ends with, for all samples.

    Args:
        head: name of the layer that makes the logits.
        logits: of the network.
        features: what the head reads; None: they were not asked for.
    """

    head: str
    logits: Outputs
    features: Outputs | None


@torch.no_grad()
def network_ends(capture: Capture, example: Any, *, features: bool) -> NetworkEnds:
    """Run the float model on all batches and keep what it ends with, as other captured tensors are kept.

    Args:
        capture: the float model and the batches.
        example: two samples.
        features: whether to keep what the last layer reads.

    Raises:
        DataError: if the model gives no logits of two classes or more with a row for each sample.
    """
    head = _find_head(capture, example)
    batches = capture.batches
    one = take(example, 0, 1, 2, batches.layout.dim, batches.layout.lists)
    pairs = list(zip(_run(capture, head, example), _run(capture, head, one), strict=True))
    kinds = [(layout_of(more, fewer, 2), more.dtype) for more, fewer in pairs]
    kept: list[Outputs] = []
    for start, _, batch in batches:
        for i, tensor in enumerate(_run(capture, head, batch)):
            layout, dtype = kinds[i]
            if layout is None:
                raise DataError(
                    f"{type(capture.model).__name__} returns {tuple(pairs[i][0].shape)} for two samples, which has no "
                    "row for each of them; choose a loss that looks at units alone, such as 'relative'"
                )
            rows = layout.rows(tensor)
            if len(kept) <= i:
                stored = batches.storage.empty((batches.samples, *rows.shape[1:]), capture.dtype or rows.dtype)
                kept.append(Outputs(stored, layout, tensor.device, dtype))
            kept[i].stored.write(start, rows)
            if not features:
                break
    if classes(kept[0].batch(slice(0, 1))).shape[-1] < 2:
        raise DataError(
            f"{type(capture.model).__name__} has {tuple(pairs[0][0].shape)} as its output for two samples, one class; "
            "losses that look at the network compare probabilities of two or more; choose another, such as 'relative'"
        )
    return NetworkEnds(head, kept[0], kept[1] if features else None)


class Behind:
    """The frozen float network behind a unit.

    Args:
        capture: the float model, whose parameters need no gradients; its units up to this one are finished.
        k: number of the unit.
        targets: its float output for all samples.
        ends: what the float network ends with.
        options: how to combine tensors over ranks, and the seed.

    Attributes:
        name: of the unit.
        targets: its float output for all samples.
        ends: what the float network ends with.
        options: of the run.
        sees_features: whether what the last layer reads depends on the unit.
        sees_logits: whether the logits do.
    """

    def __init__(self, capture: Capture, k: int, targets: Outputs, ends: NetworkEnds, options: RunOptions) -> None:
        self.capture, self.k, self.targets, self.ends, self.options = capture, k, targets, ends, options
        self.name = capture.units[k].name
        self._computes = False
        rows = slice(0, min(2, self.samples))
        with torch.enable_grad():
            found = self(targets.batch(rows).detach().requires_grad_(), rows)
        if not _close(found.logits.detach(), ends.logits.batch(rows)):
            self._computes = True
            with torch.enable_grad():
                found = self(targets.batch(rows).detach().requires_grad_(), rows)
        self.sees_logits = found.logits.requires_grad
        self.sees_features = found.features is not None and found.features.requires_grad

    @property
    def samples(self) -> int:
        """Number of samples on this rank."""
        return self.capture.batches.samples

    def chunks(self, count: int | None = None) -> Iterator[slice]:
        """The first `count` samples of this rank (None: all), some at a time."""
        end = self.samples if count is None else min(count, self.samples)
        for start in range(0, end, self.capture.chunk):
            yield slice(start, min(start + self.capture.chunk, end))

    @property
    def holds_head(self) -> bool:
        """Whether the layer that makes the logits is in the unit."""
        return any(is_inside(self.ends.head, module) for module in self.capture.units[self.k].modules)

    def warn_if_unseen(self, loss: str, seen: bool) -> bool:
        """Whether what the network ends with does not depend on the unit, which is told in a warning."""
        if not seen:
            warnings.warn(
                f"loss={loss!r}: no gradient of the network's output reaches unit {self.name} (the code behind it "
                "stops gradients, or does not read it), which is fitted by its squared error instead",
                UserWarning,
                stacklevel=2,
            )
        return not seen

    def __call__(self, output: Tensor, index: Tensor | slice) -> Ends:
        """What the network ends with, given the unit's output for some samples."""
        capture, unit = self.capture, self.capture.units[self.k]
        size = self.targets.layout.rows(output.detach()).shape[0]
        given = output * 1  # code behind it may change it in place
        if self._computes:
            functions: dict[nn.Module, Callable[..., Any]] = returning(capture.model, [unit], {0: given})
        else:
            earlier = capture.finished(self.k, index, size)
            functions = returning(capture.model, capture.units, {**earlier, self.k: given})
        batch = capture.batches.select(index)
        with replaced(functions):
            logits, features = _run(capture, self.ends.head, batch)
        return Ends(logits, features)

    def divergence_gradient(self, output: Tensor, index: Tensor | slice, temperature: float = 1.0) -> Tensor:
        """Gradient at the unit's output of ``KL(p || p~)`` of each sample, of logits over `temperature`; float32."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            total = divergence(self(leaf, index).logits, self.ends.logits.batch(index), temperature)
            if not total.requires_grad:
                return torch.zeros_like(output, dtype=torch.float32)
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        return torch.zeros_like(output, dtype=torch.float32) if gradient is None else gradient.float()

    def mean_of(self, total: Tensor, count: int) -> Tensor:
        """A sum over `count` samples of this rank as the mean over those of all ranks."""
        if self.options.reduce is None or self.options.ranks == 1:
            return total / count
        flat = torch.cat([total.reshape(-1), total.new_tensor([float(count)])])
        sums, counts = self.options.reduce(flat, "sum").split([total.numel(), 1])
        mean: Tensor = sums.view_as(total) / counts
        return mean


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(target / T) || softmax(logits / T))``, the sum over samples and places; logits as `classes` says."""
    p, q = ((classes(t).float() / temperature).log_softmax(-1) for t in (target, logits))
    total: Tensor = F.kl_div(q, p, log_target=True, reduction="sum")
    return total


def classes(logits: Tensor) -> Tensor:
    """Logits with classes in the last dimension: they have them in dimension 1 of (N, C, H, W), else in the last."""
    return logits.movedim(1, -1) if logits.ndim == 4 else logits


def is_inside(name: str, module: str) -> bool:
    """Whether a module of that name is `module`, or in it."""
    return name == module or not module or name.startswith(f"{module}.")


def _find_head(capture: Capture, example: Any) -> str:
    """The layer whose output is that of the model, or the last that runs."""
    ran: list[tuple[str, Any]] = []
    with ExitStack() as stack:
        for name, layer in layers(capture.model):
            note = _noting(ran, name)
            stack.callback(layer.register_forward_hook(note).remove)
        result = require_output(capture.run(capture.model, example))
    if not ran:
        raise DataError(f"{type(capture.model).__name__} has no layer that runs: no loss can look at what it reads")
    return next((name for name, output in reversed(ran) if output is result), ran[-1][0])


def _noting(ran: list[tuple[str, Any]], name: str) -> Callable[..., None]:
    return lambda module, args, output: ran.append((name, output))


def _run(capture: Capture, head: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits, and what the head reads."""
    read: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        read.append(args[0] if args else next(iter(kwargs.values())))

    handle = capture.model.get_submodule(head).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        logits = require_output(capture.run(capture.model, batch))
    finally:
        handle.remove()
    return logits, read[-1] if read else logits.detach()


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = _HALF_TOLERANCE if expected.dtype.itemsize < 4 else _TOLERANCE
    found, expected = found.double(), expected.double()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
