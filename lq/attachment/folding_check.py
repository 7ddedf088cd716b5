"""Check by running that a BatchNorm can be folded: which tensor feeds which module, and that outputs stay the same.

The model runs on an example in eval mode, its random states restored. Pairs that the example does not run are not
judged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq.attachment.pairs import CONVOLUTIONS, FoldablePair
from lq.structure.forward import Forward, eval_mode, run
from lq.structure.tracing import Trace, Value, trace

#: Relative difference of outputs that is more than rounding: folded convolutions of 100 layers differ by 1e-5.
_MORE_THAN_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_OF_HALF_PRECISION = 0.1


def reads_alone(
    model: nn.Module, pairs: Sequence[FoldablePair], example: Any, forward: Forward | None
) -> dict[FoldablePair, str]:
    """For each pair that the example runs, what speaks against folding it, or nothing.

    Raises:
        DataError: if the model does not take the example.
    """
    with running(model):
        traced = trace(model, lambda: run(model, example, forward), example)
    return {pair: reason for pair in pairs if (reason := _against(model, traced, pair)) is not None}


def _against(model: nn.Module, traced: Trace, pair: FoldablePair) -> str | None:
    """What the run says against a pair, or nothing; None if it did not run it."""
    first, second = pair.order
    results, operands = traced.outputs.get(first, []), traced.inputs.get(second, [])
    if not results and not operands:
        return None
    if len(results) != len(operands):
        return f"the example runs {first} {len(results)} times and {second} {len(operands)} times"
    for value, reads in zip(results, operands, strict=True):
        if value is None or value is not reads:
            return f"with the example, {second} does not read what {first} gives"
        if len(value.readers) > 1 or any(value is result for result in _sources(traced.results)):
            return f"with the example, what {first} gives is read by others than {second}"
    name = f"{pair.conv}.weight"
    if type(model.get_submodule(pair.conv)) in CONVOLUTIONS:
        used = [event.module for event in traced.calls for v in event.operands.values() if v.parameter == name]
        if used != [pair.conv] * len(results) or len(traced.uses.get(name, ())) > 1:
            return f"with the example, {name} is used elsewhere, or replaced"
    return ""


def _sources(values: Sequence[Value]) -> Iterator[Value]:
    """Values, and those that they are a selection or a concatenation of."""
    for value in values:
        yield value
        yield from _sources([value.within] if value.within is not None else value.parts)


def outputs(model: nn.Module, example: Any, forward: Forward | None) -> list[Tensor]:
    """The floating-point tensors that the model makes of the example; of its parts, if `forward` returns none."""
    tensors: list[Tensor] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        tensors.extend(_floating(output))

    handles = [module.register_forward_hook(note) for module in (model, *model.children())]
    try:
        with running(model):
            result = _floating(run(model, example, forward))
    finally:
        for handle in handles:
            handle.remove()
    return [tensor.clone() for tensor in result or tensors]


def same_outputs(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether outputs differ by rounding only. Those that cannot be compared (other shapes, NaN) count as the same."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return True
    for old, new in zip(before, after, strict=True):
        limit = _MORE_THAN_ROUNDING.get(old.dtype, _OF_HALF_PRECISION)
        difference = new.double() - old.double()
        if bool(old.isfinite().all()) and not bool(difference.norm() <= limit * old.double().norm()):
            return False
    return True


def _floating(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, compiled parts as they are written, random states restored."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
