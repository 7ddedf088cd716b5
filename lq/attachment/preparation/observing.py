"""Count the values of channels in all batches, where the functions that make them are called."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq.attachment.folding_check import running
from lq.attachment.preparation.channel_ranges import ChannelRanges
from lq.attachment.preparation.following import LAYERS, NORMS, PRODUCTS, SUMS
from lq.attachment.preparation.parts import Pair
from lq.attachment.preparation.stored import parameter
from lq.quantizer.histogram import Reduce
from lq.structure.forward import Forward, run
from lq.structure.recomputation import without_recomputation


def observed(
    model: nn.Module,
    pairs: Sequence[Pair],
    batches: Iterable[Any],
    forward: Forward | None = None,
    reduce: Reduce | None = None,
) -> dict[str, ChannelRanges]:
    """The ranges of the channels of each pair, by the name of the weight of what makes it.

    Raises:
        DataError: if the model does not take a batch, or a tensor has NaN or Inf.
    """
    found: dict[str, ChannelRanges] = {}
    watch = _Watch()
    for pair in pairs:
        weight = parameter(model, pair.maker.weight)
        bias = None if pair.maker.bias is None else parameter(model, pair.maker.bias)
        found[pair.maker.weight] = ChannelRanges(pair.channels, -1, f"what {pair.name or 'the model'} gives")
        watch.add(pair, weight, bias, found[pair.maker.weight])
    with running(model), without_recomputation(model):
        for batch in batches:
            with watch:
                run(model, batch, forward)
    if reduce is not None:
        device = next(model.parameters()).device
        for ranges in found.values():
            ranges.reduce(reduce, device)
    return found


class _Watch(TorchFunctionMode):
    """Sees what functions make of the parameters of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: dict[int, tuple[Pair, ChannelRanges]] = {}  # by the parameter that is used last

    def add(self, pair: Pair, weight: Tensor | None, bias: Tensor | None, ranges: ChannelRanges) -> None:
        """Watch what is made of a weight, or of a bias that is added later."""
        for part in (weight, bias if pair.kind == "norm" else None):
            if part is not None:
                self.pairs[id(part)] = pair, ranges

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in NORMS or name in LAYERS or name in PRODUCTS or name in SUMS:
            given = {id(found[0]): found for part in (*args, *kwargs.values()) if (found := self.pairs.get(id(part)))}
            for pair, ranges in given.values():
                if name in PRODUCTS and pair.maker.bias is not None:
                    continue  # a norm that is written out: its bias is added later
                ranges.dim = _dim(name)
                ranges.update(result.clamp(min=0) if pair.positive else result)
        return result


def _dim(function: str) -> int:
    """Dimension of a function's result that holds channels."""
    if function == "group_norm":
        return 1
    return -1 - int(function[-2]) if function.startswith("conv") else -1
