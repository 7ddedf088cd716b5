"""The quantized network, the float one, and the batches that both run on: what all units have in common."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.float_models import float_copy
from lq.attachment.padded import padded
from lq.bars import steps
from lq.errors import DataError
from lq.reconstruction.capture import Batches, Capture
from lq.reconstruction.flow import Flow, find_flow
from lq.reconstruction.heap import kept_memory
from lq.reconstruction.options import RunOptions
from lq.reconstruction.quantized_model import QuantizedModel
from lq.reconstruction.quantizers import tapped
from lq.reconstruction.storage import Storage
from lq.reconstruction.units import Granularity, Unit, find_units
from lq.structure.batch_layout import FIRST, Layout, find_layout
from lq.structure.forward import Forward, eval_mode, run
from lq.structure.outputs import require_output
from lq.structure.recomputation import without_recomputation


class Networks:
    """A quantized network and its float model, on batches.

    Args:
        model: the quantized network.
        batches: read once and kept.
        options: of the run.

    Raises:
        DataError: if there are no batches, or too few samples.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], options: RunOptions) -> None:
        storage = Storage(_device(model), options.memory_limit)
        self.model = model
        self.options = options
        self.float_model = float_copy(model) if options.teacher is None else options.teacher
        known = operator.length_hint(batches)
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
        left = operator.length_hint(rest)
        if not first:
            raise DataError(
                "reconstruction got no batches: the loader is empty; give lq.reconstruct at least one batch"
            )
        layout = _layout(self.float_model, first[0], options.forward)
        hashed = options.resume is not None
        read = steps(itertools.chain(first, rest), "Reading samples", total=known or (1 + left if left else None))
        self.batches = Batches(read, storage, digest=hashed, layout=layout)
        self.example = self.batches.example(2)
        self.quantized = QuantizedModel(model)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.batches.storage.device

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run either model on a batch."""
        return run(model, batch, self.options.forward)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, no gradients for the model's own parameters, activations quantized or not."""
        both = itertools.chain(self.model.parameters(), self.float_model.parameters())
        trained = [parameter for parameter in both if parameter.requires_grad]
        with (
            eval_mode(self.model),
            eval_mode(self.float_model),
            kept_memory(self.device),
            without_recomputation(self.model, self.float_model),
            padded(self.model, self.float_model),
            torch.compiler.set_stance("force_eager"),
            ExitStack() as stack,
        ):
            for quantizer in self.quantized.activations if self.options.activation_mode == "float" else ():
                stack.enter_context(tapped(quantizer, lambda x: x))
            try:
                for parameter in trained:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    def units(self, units: Granularity | Sequence[str | Sequence[str]]) -> list[Unit]:
        """The model, cut."""
        with torch.no_grad():
            forward = lambda: self.forward(self.float_model, self.example)  # noqa: E731
            return find_units(self.quantized, self.float_model, units, forward, self.example)

    def flow(self, units: Sequence[Unit]) -> Flow:
        """How tensors come from one unit to the next."""
        return find_flow(self.float_model, units, self.forward, self.example, 2, self.batches.layout.dim)

    def captures(self, units: Sequence[Unit]) -> tuple[Capture, Capture]:
        """Of the quantized network and of the float one."""
        flow, options = self.flow(units), self.options
        quantized, floats = (
            Capture(model, units, flow, self.forward, self.batches, dtype=options.kept_dtype, chunk=options.batch_size)
            for model in (self.model, self.float_model)
        )
        return quantized, floats


def _layout(model: nn.Module, batch: Any, forward: Forward | None) -> Layout:
    """Where samples lie in batches, told by the output of the float model; in the first dimension if it has none."""
    with eval_mode(model), without_recomputation(model), torch.no_grad(), torch.random.fork_rng():
        output = run(model, batch, forward)
        if not isinstance(output, Tensor) or not output.ndim:
            return FIRST
        return find_layout(batch, lambda part: require_output(run(model, part, forward)))


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
