"""How tensors come from one unit to the next: what a run of one unit has to know of the others.

Between units a model computes whatever its code says: pooling, position embeddings, sums of branches. Two small runs of
the float model find out, for each unit, whether its input *is* the output of an earlier one, which earlier outputs its
input depends on otherwise, and along which dimension samples lie in its tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lq.errors import DataError
from lq.reconstruction.units import Unit
from lq.structure.samples import take

#: Runs a model on a batch.
Run = Callable[[nn.Module, Any], Any]


class Reached(Exception):  # noqa: N818 - not an error: it ends a forward that has come far enough
    """The unit whose input was asked for is about to run."""


@dataclass(frozen=True)
class Lies:
    """How samples lie in a tensor: along `dim`, `each` rows for every sample (windows of one image, say)."""

    dim: int
    each: int

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor` with one row for each sample, (S, ...)."""
        found = tensor.movedim(self.dim, 0)
        return found.unflatten(0, (-1, self.each)) if self.each > 1 else found

    def tensor(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return (rows.flatten(0, 1) if self.each > 1 else rows).movedim(0, self.dim)


@dataclass
class Seen:
    """One unit in a run: the leaves of its arguments, their structure, its output; and copies of what they were."""

    leaves: list[Any]
    spec: TreeSpec
    output: Tensor
    given: list[Any]
    made: Tensor
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
    inputs: tuple[tuple[Lies | None, ...], ...]
    outputs: tuple[Lies, ...]
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
        seen, fewer = (_record(model, units, run, part) for part in (example, take(example, 0, 1, samples, batch_dim)))
    inputs, outputs = [], []
    for unit, one, other in zip(units, seen, fewer, strict=True):
        if any(not isinstance(a, Tensor) and a != b for a, b in zip(one.leaves, other.leaves, strict=True)):
            raise DataError(
                f"unit {unit.name} is called with values that depend on the number of samples, which cannot be "
                "captured; choose other units, by name"
            )
        inputs.append(tuple(_lies(a, b, samples) for a, b in zip(one.leaves, other.leaves, strict=True)))
        output = _lies(one.output, other.output, samples)
        if output is None or not any(inputs[-1]):
            raise DataError(
                f"unit {unit.name}: its tensors, such as {tuple(one.output.shape)}, do not grow with the number of "
                "samples; choose other units, by name"
            )
        outputs.append(output)
    direct = tuple(_direct(seen, k, inputs[k]) for k in range(len(units)))
    shapes = tuple((lies.rows(one.output).shape[1:], one.output.dtype) for lies, one in zip(outputs, seen, strict=True))
    needs = _needs(model, units, run, example, seen, direct)
    return Flow(direct, needs, tuple(inputs), tuple(outputs), shapes)


@contextmanager
def replaced(modules: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have modules return what a function returns instead of running; what is put around them stays."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module, function in modules.items():
            module.forward = function
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


@contextmanager
def stop_at(module: nn.Module, taken: list[Any]) -> Iterator[None]:
    """Put the arguments of `module` into `taken` and end the forward there."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.append((args, kwargs))
        raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    except Reached:
        pass
    finally:
        handle.remove()


def _record(model: nn.Module, units: Sequence[Unit], run: Run, batch: Any) -> list[Seen]:
    found: dict[int, Seen] = {}
    given: dict[int, tuple[list[Any], TreeSpec, tuple[int, ...]]] = {}
    kept: dict[int, list[Any]] = {}

    def before(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, spec = tree_flatten((args, kwargs))
            given[k] = leaves, spec, tuple(t._version if isinstance(t, Tensor) else 0 for t in leaves)
            kept[k] = [t.clone() if isinstance(t, Tensor) else t for t in leaves]

        return hook

    def after(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves, spec, versions = given[k]
            found[k] = Seen(leaves, spec, output, kept[k], output.clone(), versions, output._version)

        return hook

    with ExitStack() as stack:
        for k, unit in enumerate(units):
            modules = unit.bind(model)
            first = modules[0].register_forward_pre_hook(before(k), with_kwargs=True, prepend=True)
            for handle in (first, modules[-1].register_forward_hook(after(k))):
                stack.callback(handle.remove)
        run(model, batch)
    return [found[k] for k in range(len(units))]


def _lies(more: Any, fewer: Any, samples: int) -> Lies | None:
    """How samples lie in a tensor, of which `fewer` is the same for one sample instead of `samples`."""
    if not isinstance(more, Tensor) or more.shape == fewer.shape:
        return None
    dim = next(d for d in range(more.ndim) if more.shape[d] != fewer.shape[d])
    return Lies(dim, fewer.shape[dim]) if more.shape[dim] == samples * fewer.shape[dim] else None


def _direct(seen: Sequence[Seen], k: int, lies: Sequence[Lies | None]) -> int | None:
    """The unit whose output is the one input of unit `k`, and was not changed in place since."""
    one = seen[k]
    varying = [i for i, found in enumerate(lies) if found is not None]
    if len(varying) != 1:
        return None
    leaf, version = one.leaves[varying[0]], one.versions[varying[0]]
    return next((j for j in range(k) if seen[j].output is leaf and seen[j].output_version == version), None)


def _needs(
    model: nn.Module,
    units: Sequence[Unit],
    run: Run,
    example: Any,
    seen: Sequence[Seen],
    direct: Sequence[int | None],
) -> tuple[frozenset[int], ...]:
    """Which outputs an input is computed from: those that a gradient from it arrives at, when no unit computes."""
    leaves = [torch.zeros_like(one.output).requires_grad_() for one in seen]
    given: list[list[Tensor]] = [[] for _ in units]

    def note(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[k] += [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]

        return hook

    with ExitStack() as stack:
        for k, unit in enumerate(units):
            handle = unit.bind(model)[0].register_forward_pre_hook(note(k), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        outputs = {
            k: leaf * 1 for k, leaf in enumerate(leaves)
        }  # no leaves of the graph: code may change them in place
        stack.enter_context(replaced(returning(model, units, outputs)))
        run(model, example)
    found = []
    for k, tensors in enumerate(given):
        if direct[k] is not None:
            found.append(frozenset({direct[k]}))
            continue
        # an average, so that neither its size nor that of the gradient matters: only whether there is one
        with torch.enable_grad():
            total = sum((t.double().mean() for t in tensors if t.is_floating_point()), torch.zeros(()))
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) if tensors else ()
        found.append(frozenset(j for j, grad in enumerate(grads) if grad is not None and j != k))
    # Where code between units stops gradients (frozen parts, comparisons), all that came before is kept.
    for k in (k for k in range(1, len(units)) if direct[k] is None):
        if not _suffices(model, units, run, example, seen, k, found[k]):  # type: ignore[arg-type]
            found[k] = frozenset(range(k))
    return tuple(found)  # type: ignore[arg-type]


@torch.no_grad()
def _suffices(
    model: nn.Module,
    units: Sequence[Unit],
    run: Run,
    example: Any,
    seen: Sequence[Seen],
    k: int,
    needed: frozenset[int],
) -> bool:
    """Whether the arguments of unit `k` are what they were if only these outputs of earlier units are."""
    outputs = {j: seen[j].made.clone() if j in needed else torch.zeros_like(seen[j].made) for j in range(k)}
    taken: list[Any] = []
    with replaced(returning(model, units, outputs)), stop_at(units[k].bind(model)[0], taken):
        run(model, example)
    leaves = tree_flatten(taken[0])[0] if taken else []
    return all(
        not isinstance(a, Tensor) or torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(leaves, seen[k].given, strict=True)
    )


def returning(
    model: nn.Module, units: Sequence[Unit], outputs: Mapping[int, Tensor]
) -> dict[nn.Module, Callable[..., Tensor]]:
    """For `replaced`: units that return these outputs without computing."""

    def give(output: Tensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: output

    found = {}
    for k, output in outputs.items():
        *inner, last = units[k].bind(model)
        found.update(dict.fromkeys(inner, _first_argument))
        found[last] = give(output)
    return found


def _first_argument(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def arguments(leaves: Sequence[Any], spec: TreeSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from their leaves."""
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs
