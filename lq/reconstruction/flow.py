"""How tensors come from one unit to the next: what a run of one unit has to know of the others.

Between units a model computes whatever its code says: pooling, position embeddings, sums of branches. Two small runs of
the float model find out, for each unit, whether its input *is* the output of an earlier one, which earlier outputs its
input depends on otherwise, and along which dimension samples lie in its tensors.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from lq.errors import DataError
from lq.reconstruction.partial_runs import replaced, returning, stop_at
from lq.reconstruction.units import Unit
from lq.structure.samples import take

#: Runs a model on a batch.
Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class SampleLayout:
    """How samples lie in a tensor: along `dim`, `each` rows for every sample (windows of one image, say)."""

    dim: int
    each: int

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor` with one row for each sample, (S, ...)."""
        rows = tensor.movedim(self.dim, 0)
        return rows.unflatten(0, (-1, self.each)) if self.each > 1 else rows

    def tensor(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return (rows.flatten(0, 1) if self.each > 1 else rows).movedim(0, self.dim)


@dataclass
class UnitCall:
    """One unit in a run of the model.

    Args:
        leaves: of its arguments.
        spec: how the leaves make up the arguments.
        output: what it returned.
        leaf_copies: the leaves as they were when it was called.
        output_copy: the output as it was when it returned.
        versions: how often the leaves had been changed in place by then.
        output_version: how often the output had been.
    """

    leaves: list[Any]
    spec: TreeSpec
    output: Tensor
    leaf_copies: list[Any]
    output_copy: Tensor
    versions: tuple[int, ...] = ()
    output_version: int = 0


@dataclass(frozen=True)
class Flow:
    """What is known of the tensors between units.

    Args:
        direct: for each unit, the unit whose output is its one and only input; None: there is none.
        needs: for each unit, the earlier units whose outputs its input is computed from.
        inputs: for each unit, how samples lie in the leaves of its arguments; None: the leaf is the same for all.
        outputs: for each unit, how samples lie in its output.
        shapes: for each unit, the shape of its output's row for one sample, and its type.
    """

    direct: tuple[int | None, ...]
    needs: tuple[frozenset[int], ...]
    inputs: tuple[tuple[SampleLayout | None, ...], ...]
    outputs: tuple[SampleLayout, ...]
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]

    def last_use(self, unit: int) -> int:
        """The last unit whose input depends on the output of `unit`; -1: none does."""
        return max((k for k, needed in enumerate(self.needs) if unit in needed), default=-1)


def find_flow(
    model: nn.Module, units: Sequence[Unit], run: Run, example: Any, samples: int, batch_dim: int = 0
) -> Flow:
    """Look at `model`, a float one, on `example`, a batch of `samples` samples (two or more) along `batch_dim`.

    Raises:
        DataError: if samples cannot be told from each other in the tensors of a unit.
    """
    with torch.no_grad():
        calls, fewer = (_record(model, units, run, part) for part in (example, take(example, 0, 1, samples, batch_dim)))
    inputs, outputs = [], []
    for unit, one, other in zip(units, calls, fewer, strict=True):
        if any(not isinstance(a, Tensor) and a != b for a, b in zip(one.leaves, other.leaves, strict=True)):
            raise DataError(
                f"unit {unit.name} is called with values that depend on the number of samples, which cannot be "
                "captured; choose other units, by name"
            )
        inputs.append(tuple(_layout(a, b, samples) for a, b in zip(one.leaves, other.leaves, strict=True)))
        output = _layout(one.output, other.output, samples)
        if output is None or not any(inputs[-1]):
            raise DataError(
                f"unit {unit.name}: its tensors, such as {tuple(one.output.shape)}, do not grow with the number of "
                "samples; choose other units, by name"
            )
        outputs.append(output)
    direct = tuple(_direct(calls, k, inputs[k]) for k in range(len(units)))
    pairs = zip(outputs, calls, strict=True)
    shapes = tuple((layout.rows(one.output).shape[1:], one.output.dtype) for layout, one in pairs)
    needs = _Dependencies(model, units, run, example, calls).needs(direct)
    return Flow(direct, needs, tuple(inputs), tuple(outputs), shapes)


def _record(model: nn.Module, units: Sequence[Unit], run: Run, batch: Any) -> list[UnitCall]:
    calls: dict[int, UnitCall] = {}
    arguments: dict[int, tuple[list[Any], TreeSpec, tuple[int, ...]]] = {}
    copies: dict[int, list[Any]] = {}

    def before(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, spec = tree_flatten((args, kwargs))
            arguments[k] = leaves, spec, tuple(t._version if isinstance(t, Tensor) else 0 for t in leaves)
            copies[k] = [t.clone() if isinstance(t, Tensor) else t for t in leaves]

        return hook

    def after(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves, spec, versions = arguments[k]
            calls[k] = UnitCall(leaves, spec, output, copies[k], output.clone(), versions, output._version)

        return hook

    with ExitStack() as stack:
        for k, unit in enumerate(units):
            modules = unit.bind(model)
            first = modules[0].register_forward_pre_hook(before(k), with_kwargs=True, prepend=True)
            for handle in (first, modules[-1].register_forward_hook(after(k))):
                stack.callback(handle.remove)
        run(model, batch)
    return [calls[k] for k in range(len(units))]


def _layout(more: Any, fewer: Any, samples: int) -> SampleLayout | None:
    """How samples lie in a tensor, of which `fewer` is the same for one sample instead of `samples`."""
    if not isinstance(more, Tensor) or more.shape == fewer.shape:
        return None
    dim = next(d for d in range(more.ndim) if more.shape[d] != fewer.shape[d])
    return SampleLayout(dim, fewer.shape[dim]) if more.shape[dim] == samples * fewer.shape[dim] else None


def _direct(calls: Sequence[UnitCall], k: int, layouts: Sequence[SampleLayout | None]) -> int | None:
    """The unit whose output is the one input of unit `k`, and was not changed in place since."""
    call = calls[k]
    varying = [i for i, layout in enumerate(layouts) if layout is not None]
    if len(varying) != 1:
        return None
    leaf, version = call.leaves[varying[0]], call.versions[varying[0]]
    return next((j for j in range(k) if calls[j].output is leaf and calls[j].output_version == version), None)


@dataclass
class _Dependencies:
    """Finds which outputs of units the inputs of others are computed from.

    Args:
        model: the float model.
        units: its units.
        run: runs the model on a batch.
        example: the batch.
        calls: of the units in a run on it.
    """

    model: nn.Module
    units: Sequence[Unit]
    run: Run
    example: Any
    calls: Sequence[UnitCall]

    def needs(self, direct: Sequence[int | None]) -> tuple[frozenset[int], ...]:
        """For each unit, the earlier units: those that a gradient from its input arrives at, when no unit computes.

        Args:
            direct: units whose output is the one input of each, if it is.
        """
        outputs, arguments = self._arguments_without_units()
        needs = []
        for k, tensors in enumerate(arguments):
            source = direct[k]
            if source is not None:
                needs.append(frozenset({source}))
                continue
            # an average, so that neither its size nor that of the gradient matters: only whether there is one
            with torch.enable_grad():
                total = sum((t.double().mean() for t in tensors if t.is_floating_point()), torch.zeros(()))
            grads = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True) if tensors else ()
            needs.append(frozenset(j for j, grad in enumerate(grads) if grad is not None and j != k))
        # Where code between units stops gradients (frozen parts, comparisons), all that came before is kept.
        for k in (k for k in range(1, len(self.units)) if direct[k] is None):
            if not self._suffice(k, needs[k]):
                needs[k] = frozenset(range(k))
        return tuple(needs)

    def _arguments_without_units(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Leaves of a graph in place of what units return, and the tensors in each unit's arguments made of them."""
        leaves = [torch.zeros_like(call.output).requires_grad_() for call in self.calls]
        arguments: list[list[Tensor]] = [[] for _ in self.units]

        def note(k: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
                arguments[k] += [t for t in tensors if t.requires_grad]

            return hook

        with ExitStack() as stack:
            for k, unit in enumerate(self.units):
                handle = unit.bind(self.model)[0].register_forward_pre_hook(note(k), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad())
            outputs = {k: leaf * 1 for k, leaf in enumerate(leaves)}  # code may change them in place, but not leaves
            stack.enter_context(replaced(returning(self.model, self.units, outputs)))
            self.run(self.model, self.example)
        return leaves, arguments

    @torch.no_grad()
    def _suffice(self, k: int, needed: frozenset[int]) -> bool:
        """Whether the arguments of unit `k` are what they were if only these outputs of earlier units are."""
        copies = [call.output_copy for call in self.calls[:k]]
        outputs = {j: copy.clone() if j in needed else torch.zeros_like(copy) for j, copy in enumerate(copies)}
        taken: list[Any] = []
        replacing = replaced(returning(self.model, self.units, outputs))
        with replacing, stop_at(self.units[k].bind(self.model)[0], taken):
            self.run(self.model, self.example)
        leaves = tree_flatten(taken[0])[0] if taken else []
        return all(
            not isinstance(a, Tensor) or torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
            for a, b in zip(leaves, self.calls[k].leaf_copies, strict=True)
        )
