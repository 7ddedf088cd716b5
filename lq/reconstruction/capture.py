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
from lq.reconstruction.flow import Flow, Run, SampleLayout
from lq.reconstruction.identity import Digest
from lq.reconstruction.partial_runs import replaced, returning, stop_at
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
        self.storage = storage
        self._batches: list[tuple[list[Any], TreeSpec, list[torch.device | None]]] = []
        self.sizes: list[int] = []
        self._digest = Digest()
        for batch in batches:
            leaves, spec = tree_flatten(batch)
            for part in (str(spec), *leaves) if digest else ():
                self._digest.add(part)
            devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
            stored = [storage.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._batches.append((stored, spec, devices))
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
        stored, spec, devices = self._batches[position]
        leaves = [
            leaf.whole().to(device) if isinstance(leaf, Stored) else leaf
            for leaf, device in zip(stored, devices, strict=True)
        ]
        return tree_unflatten(leaves, spec)

    def example(self, count: int) -> Any:
        """The first samples, of one batch or more.

        Raises:
            DataError: if there are fewer.
        """
        if self.samples < count:
            raise DataError(f"reconstruction got {self.samples} sample(s); give at least {count}")
        joined, size = self[0], self.sizes[0]
        for position in range(1, len(self.sizes)):
            if size < count:
                joined = join(joined, self[position], size, self.sizes[position], self.layout.dim)
                size += self.sizes[position]
        return take(joined, 0, count, size, self.layout.dim, self.layout.lists)

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
        layouts: how samples lie in each leaf; None: it is the same for all.
        device: where batches go.
        dtypes: of the leaves, as the model has them.
    """

    leaves: list[Any]
    spec: TreeSpec
    layouts: Sequence[SampleLayout | None]
    device: torch.device
    dtypes: Sequence[torch.dtype | None]

    def batch(self, index: Tensor | slice) -> list[Any]:
        """The leaves for some samples."""
        return [
            _take(leaf, index, layout, self.device, dtype) if isinstance(leaf, Stored) and layout is not None else leaf
            for leaf, layout, dtype in zip(self.leaves, self.layouts, self.dtypes, strict=True)
        ]


@dataclass
class Outputs:
    """The output of a unit for all samples."""

    stored: Stored
    layout: SampleLayout
    device: torch.device
    dtype: torch.dtype

    def batch(self, index: Tensor | slice) -> Tensor:
        """The output for some samples."""
        return _take(self.stored, index, self.layout, self.device, self.dtype)


def _take(
    stored: Stored, index: Tensor | slice, layout: SampleLayout, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    return layout.tensor(stored.rows(index).to(device=device, dtype=dtype, non_blocking=True))


class Capture:
    """Runs a model unit by unit on batches.

    Args:
        model: the float model or the quantized one; runs in eval mode.
        units: its units.
        flow: how tensors come from one to the next (`find_flow`).
        run: runs the model on a batch.
        batches: all data; tensors are kept where they are.
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
        *,
        dtype: torch.dtype | None = None,
        chunk: int = 32,
    ) -> None:
        self.model = model
        self.units = units
        self.flow = flow
        self.run = run
        self.batches = batches
        self.dtype = dtype
        self.chunk = chunk
        self._outputs: dict[int, Outputs] = {}
        self._zeros: dict[Any, Tensor] = {}

    @torch.no_grad()
    def inputs(self, k: int) -> Inputs:
        """The arguments of unit `k`; those of all units before must have been `finish`ed."""
        source = self.flow.direct[k]
        inputs: Inputs | None = None
        for start, size, batch in self.batches:
            # Where an earlier output is the input, one batch tells what the arguments look like.
            leaves, spec = tree_flatten(self._arguments(k, batch, start, size))
            if inputs is None:
                inputs = self._begin(k, leaves, spec, source)
            if source is not None:
                break
            for leaf, stored, layout in zip(leaves, inputs.leaves, self.flow.inputs[k], strict=True):
                if isinstance(stored, Stored) and layout is not None:
                    stored.write(start, layout.rows(leaf))
        if inputs is None:
            raise StateError("there are no batches to reconstruct with")
        return inputs

    def pass_on(self, k: int, inputs: Inputs) -> None:
        """Compute and keep the output of unit `k`, if a later unit needs it."""
        if self.flow.last_use(k) >= 0:
            self.finish(k, inputs)

    @torch.no_grad()
    def finish(self, k: int, inputs: Inputs) -> Outputs:
        """Compute the output of unit `k`; it is kept while a later unit needs it."""
        modules = self.units[k].bind(self.model)
        layout = self.flow.outputs[k]
        outputs: Outputs | None = None
        for start in range(0, self.batches.samples, self.chunk):
            rows = slice(start, min(start + self.chunk, self.batches.samples))
            output = call(modules, inputs.batch(rows), inputs.spec)
            values = layout.rows(output)
            if outputs is None:
                outputs = Outputs(self._empty(values), layout, output.device, output.dtype)
            outputs.stored.write(start, values)
        if outputs is None:
            raise StateError("there are no batches to reconstruct with")
        self._outputs[k] = outputs
        for done in [j for j in self._outputs if self.flow.last_use(j) <= k]:
            del self._outputs[done]
        return outputs

    def _empty(self, rows: Tensor) -> Stored:
        dtype = self.dtype if self.dtype is not None and rows.is_floating_point() else rows.dtype
        return self.batches.storage.empty((self.batches.samples, *rows.shape[1:]), dtype)

    def _begin(self, k: int, leaves: list[Any], spec: TreeSpec, source: int | None) -> Inputs:
        """Room for the arguments of unit `k`, which look like `leaves`."""
        stored: list[Any] = []
        for leaf, layout in zip(leaves, self.flow.inputs[k], strict=True):
            if layout is None:
                stored.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
            elif source is not None:
                stored.append(self._outputs[source].stored)
            else:
                stored.append(self._empty(layout.rows(leaf)))
        device = next((t.device for t in leaves if isinstance(t, Tensor)), torch.device("cpu"))
        dtypes = [t.dtype if isinstance(t, Tensor) else None for t in leaves]
        return Inputs(stored, spec, self.flow.inputs[k], device, dtypes)

    def _arguments(self, k: int, batch: Any, start: int, size: int) -> Any:
        """The arguments of unit `k` for a batch."""
        done = self.units[:k]
        outputs = {}
        for j in range(k):
            needed = self._outputs.get(j) if j in self.flow.needs[k] else None
            outputs[j] = self._unused(j, size) if needed is None else needed.batch(slice(start, start + size))
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
            self._zeros[key] = torch.zeros(shape, dtype=dtype, device=self.batches.storage.device)
        return self.flow.outputs[j].tensor(self._zeros[key])


def call(modules: Sequence[nn.Module], leaves: Sequence[Any], spec: TreeSpec) -> Tensor:
    """Run a chain of modules; `leaves` are those of the first one's arguments."""
    first, *others = modules
    args, kwargs = tree_unflatten(leaves, spec)
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
