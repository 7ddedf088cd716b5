"""Inputs and outputs of units for all samples: captured one unit after the other, at a cost linear in depth.

The input of a unit is the output of the one before, as it is kept. Where the model computes something between units,
its own code runs for that: units that are done return what was kept of them, and the run ends where the next unit
begins. No unit is computed twice, and only outputs that a later unit needs are kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lq.attachment.sites import INPUT, OUTPUT
from lq.errors import DataError, StateError
from lq.reconstruction.flow import Flow, Lies, Run, arguments, replaced, returning, stop_at
from lq.reconstruction.identity import Digest
from lq.reconstruction.storage import Storage, Stored
from lq.reconstruction.units import Unit
from lq.structure.batch_layout import FIRST, Layout
from lq.structure.samples import join, take


class Batches:
    """The batches that a model is run on.

    Args:
        batches: read once.
        storage: where their tensors are kept.
        digest: whether to hash them on the way.
        layout: where samples lie in them.
    """

    def __init__(self, batches: Iterable[Any], storage: Storage, digest: bool = False, layout: Layout = FIRST) -> None:
        self.layout = layout
        self._batches: list[tuple[list[Any], TreeSpec, list[torch.device | None]]] = []
        self.sizes: list[int] = []
        self._digest = Digest()
        for batch in batches:
            leaves, spec = tree_flatten(batch)
            for thing in (str(spec), *leaves) if digest else ():
                self._digest.add(thing)
            devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
            kept = [storage.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._batches.append((kept, spec, devices))
            self.sizes.append(layout.size(batch))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """A hash of all batches in their order, if they were hashed."""
        return self._digest.value

    def __getitem__(self, position: int) -> Any:
        """A batch, on the device it came from."""
        kept, spec, devices = self._batches[position]
        leaves = [
            leaf.whole().to(device) if isinstance(leaf, Stored) else leaf
            for leaf, device in zip(kept, devices, strict=True)
        ]
        return tree_unflatten(leaves, spec)

    def example(self, count: int) -> Any:
        """The first samples, of one batch or more.

        Raises:
            DataError: if there are fewer.
        """
        if self.samples < count:
            raise DataError(f"reconstruction got {self.samples} sample(s); give at least {count}")
        found, size = self[0], self.sizes[0]
        for position in range(1, len(self.sizes)):
            if size < count:
                found = join(found, self[position], size, self.sizes[position], self.layout.dim)
                size += self.sizes[position]
        return take(found, 0, count, size, self.layout.dim, self.layout.lists)

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Number of the first sample, number of samples, and the batch."""
        start = 0
        for position, size in enumerate(self.sizes):
            yield start, size, self[position]
            start += size


@dataclass
class Inputs:
    """The arguments of a unit for all samples.

    Args:
        leaves: of its arguments; those that differ between samples are `Stored`, (N, ...).
        spec: how the leaves make up the arguments.
        lies: how samples lie in each leaf.
        device: where batches go.
        dtypes: of the leaves, as the model has them.
    """

    leaves: list[Any]
    spec: TreeSpec
    lies: Sequence[Lies | None]
    device: torch.device
    dtypes: Sequence[torch.dtype | None]

    def batch(self, index: Tensor | slice) -> list[Any]:
        """The leaves for some samples."""
        return [
            _take(leaf, index, lies, self.device, dtype) if isinstance(leaf, Stored) and lies is not None else leaf
            for leaf, lies, dtype in zip(self.leaves, self.lies, self.dtypes, strict=True)
        ]


@dataclass
class Outputs:
    """The output of a unit for all samples."""

    stored: Stored
    lies: Lies
    device: torch.device
    dtype: torch.dtype

    def batch(self, index: Tensor | slice) -> Tensor:
        """The output for some samples."""
        return _take(self.stored, index, self.lies, self.device, self.dtype)


def _take(stored: Stored, index: Tensor | slice, lies: Lies, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return lies.tensor(stored.rows(index).to(device=device, dtype=dtype, non_blocking=True))


class Capture:
    """Runs a model unit by unit on batches.

    Args:
        model: the float model or the quantized one; runs in eval mode.
        units: its units.
        flow: what `find_flow` found of them.
        run: runs the model on a batch.
        batches: all data.
        storage: where tensors are kept.
        dtype: what they are kept as; None: as they are.
        chunk: samples that a unit computes at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        flow: Flow,
        run: Run,
        batches: Batches,
        storage: Storage,
        dtype: torch.dtype | None = None,
        chunk: int = 32,
    ) -> None:
        self.model = model
        self.units = units
        self.flow = flow
        self.run = run
        self.batches = batches
        self.storage = storage
        self.dtype = dtype
        self.chunk = chunk
        self._outputs: dict[int, Outputs] = {}
        self._zeros: dict[Any, Tensor] = {}

    @torch.no_grad()
    def inputs(self, k: int) -> Inputs:
        """The arguments of unit `k`; those of all units before must have been `finish`ed."""
        source = self.flow.direct[k]
        found: Inputs | None = None
        for start, size, batch in self.batches:
            # Where an earlier output is the input, one batch tells what the arguments look like.
            taken = self._arguments(k, batch, start, size)
            leaves, spec = tree_flatten(taken)
            if found is None:
                found = self._begin(k, leaves, spec, source)
            if source is not None:
                break
            for leaf, stored, lies in zip(leaves, found.leaves, self.flow.inputs[k], strict=True):
                if isinstance(stored, Stored) and lies is not None:
                    stored.write(start, lies.rows(leaf))
        if found is None:
            raise StateError("there are no batches to reconstruct with")
        return found

    def pass_on(self, k: int, inputs: Inputs) -> None:
        """Compute and keep the output of unit `k`, if a later unit needs it."""
        if self.flow.last_use(k) >= 0:
            self.finish(k, inputs)

    @torch.no_grad()
    def finish(self, k: int, inputs: Inputs) -> Outputs:
        """Compute the output of unit `k`; it is kept while a later unit needs it."""
        modules = self.units[k].bind(self.model)
        kept: Outputs | None = None
        for start in range(0, self.batches.samples, self.chunk):
            rows = slice(start, min(start + self.chunk, self.batches.samples))
            output = call(modules, inputs.batch(rows), inputs.spec)
            lies = self.flow.outputs[k]
            found = lies.rows(output)
            if kept is None:
                kept = Outputs(self._empty(found), lies, output.device, output.dtype)
            kept.stored.write(start, found)
        if kept is None:
            raise StateError("there are no batches to reconstruct with")
        self._outputs[k] = kept
        for done in [j for j in self._outputs if self.flow.last_use(j) <= k]:
            del self._outputs[done]
        return kept

    def _empty(self, rows: Tensor) -> Stored:
        dtype = self.dtype if self.dtype is not None and rows.is_floating_point() else rows.dtype
        return self.storage.empty((self.batches.samples, *rows.shape[1:]), dtype)

    def _begin(self, k: int, leaves: list[Any], spec: TreeSpec, source: int | None) -> Inputs:
        """Room for the arguments of unit `k`, which look like `leaves`."""
        kept: list[Any] = []
        for leaf, lies in zip(leaves, self.flow.inputs[k], strict=True):
            if lies is None:
                kept.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
            elif source is not None:
                kept.append(self._outputs[source].stored)
            else:
                kept.append(self._empty(lies.rows(leaf)))
        device = next((t.device for t in leaves if isinstance(t, Tensor)), torch.device("cpu"))
        dtypes = [t.dtype if isinstance(t, Tensor) else None for t in leaves]
        return Inputs(kept, spec, self.flow.inputs[k], device, dtypes)

    def _arguments(self, k: int, batch: Any, start: int, size: int) -> Any:
        """The arguments of unit `k` for a batch."""
        done = self.units[:k]
        outputs = {}
        for j in range(k):
            kept = self._outputs.get(j) if j in self.flow.needs[k] else None
            outputs[j] = self._unused(j, size) if kept is None else kept.batch(slice(start, start + size))
        taken: list[Any] = []
        with ExitStack() as stack:
            for unit in done:
                stack.enter_context(_without_quantizers(unit.bind(self.model)))
            stack.enter_context(replaced(returning(self.model, self.units, outputs)))
            stack.enter_context(stop_at(self.units[k].bind(self.model)[0], taken))
            self.run(self.model, batch)
        if not taken:
            raise StateError(f"unit {self.units[k].name} was not reached in a run of {type(self.model).__name__}")
        return taken[0]

    def _unused(self, j: int, size: int) -> Tensor:
        """Something of the shape of an output whose values do not matter; one tensor for all of that shape."""
        shape, dtype = (size, *self.flow.shapes[j][0]), self.flow.shapes[j][1]
        key = (shape, dtype)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(shape, dtype=dtype, device=self.storage.device)
        return self.flow.outputs[j].tensor(self._zeros[key])


def call(modules: Sequence[nn.Module], leaves: Sequence[Any], spec: TreeSpec) -> Tensor:
    """Run a chain of modules; `leaves` are those of the first one's arguments."""
    first, *others = modules
    args, kwargs = arguments(leaves, spec)
    output = first(*args, **kwargs)
    for module in others:
        output = module(output)
    return output  # type: ignore[no-any-return]


@contextmanager
def _without_quantizers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Take away what quantizes the input and the output of modules that do not compute."""
    taken = [(m, name, m._modules[name]) for m in modules for name in (INPUT, OUTPUT) if name in m._modules]
    try:
        for module, name, _ in taken:
            module._modules[name] = nn.Identity()
        yield
    finally:
        for module, name, quantizer in taken:
            module._modules[name] = quantizer
