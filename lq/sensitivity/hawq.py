r"""HAWQ-V2: ``Ω_l(b) = 1/2 mean-trace(H_l) * |Q_b(W_l) - W_l|^2`` with the Hessian of the loss.

Dong et al., HAWQ-V2, equations 5 and 9: the trace is Hutchinson's, ``mean_v v^T H v`` over random signs ``v``; one
vector spans all tensors, whose cross terms vanish in the mean (and are most of its noise: see the standard errors).
Activations get the trace of the Hessian with respect to themselves, per sample. Vectors are drawn until the traces move
by less than a relative tolerance (in absolute values: published code compares signed ones and stops at any negative
change), or a limit is reached. The factor 1/2 of the expansion, which HAWQ leaves out, is kept: the table is in units
of the loss. Negative traces count as zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lq.attachment.float_models import float_model
from lq.bars import parts
from lq.errors import SpecError, StateError
from lq.sensitivity.metric import Loss, Metric
from lq.sensitivity.metrics import grouped, signs
from lq.sensitivity.reading import Reading, log_likelihood
from lq.sensitivity.table import Accumulator, Found
from lq.sensitivity.tensors import MeasuredTensor
from lq.structure.outputs import require_loss
from lq.structure.recomputation import recomputed


@dataclass(frozen=True)
class HawqV2(Metric):
    """Mean Hessian trace times squared rounding error.

    Args:
        vectors: largest number of random vectors per batch.
        tolerance: relative change of the traces below which no more are drawn.
        loss: mean loss of a batch, called with the model and the batch; None: as in `Fisher`.
    """

    vectors: int = 100
    tolerance: float = 1e-3
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if self.vectors < 1 or self.tolerance < 0:
            raise SpecError(
                f"HawqV2(vectors={self.vectors}, tolerance={self.tolerance}): needs a vector and no negative tolerance"
            )

    def measure(
        self,
        model: nn.Module,
        tensors: Sequence[MeasuredTensor],
        batches: Iterable[Any],
        reading: Reading,
    ) -> Found:
        """Draw vectors for every batch; standard errors are over batches."""
        sums, samples, drawn = Accumulator(tensors), 0, 0
        for batch in batches:
            labelled = reading.has_label(batch) if self.loss is None else None
            if labelled is not None and not labelled.any():
                sums.ignored += len(labelled)
                continue
            size = reading.layout.size(batch) if labelled is None else int(labelled.sum())
            with float_model(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                found, count = self._batch(model, tensors, batch, reading, size)
            sums.add(found)
            samples, drawn = samples + size, drawn + count
        notes = (f"{drawn / max(sums.count, 1):.0f} random vectors per batch; standard errors are over batches",)
        found_of_batches = sums.found(0.5, reading.reduce, notes)
        total = torch.tensor(float(samples))
        return replace(found_of_batches, samples=int(total if reading.reduce is None else reading.reduce(total, "sum")))

    def _batch(
        self,
        model: nn.Module,
        tensors: Sequence[MeasuredTensor],
        batch: Any,
        reading: Reading,
        samples: int,
    ) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Trace times squared change of each tensor, of the whole (1, W) and of groups (1, G, W); number of vectors."""
        taps = [_Leaves(tensor, reading.layout.size(batch)) for tensor in tensors]
        if self.loss is not None:
            value = require_loss(self.loss(model, batch)) * samples
        else:
            output = reading.output(model, batch)
            value = -log_likelihood(output, reading.labels(batch)).sum()
        for tap in taps:
            tap.forward_ended = True
        owned = [(tap, leaf) for tap in taps for leaf in tap.leaves]
        if not owned or not value.requires_grad:
            raise StateError("the output does not depend on a quantized layer; nothing can be measured")
        leaves = [leaf for _, leaf in owned]
        gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
        if not reached:
            raise StateError("the loss has no second derivative with respect to any quantized tensor")
        count, mean = 0, torch.zeros(len(taps), dtype=torch.float64)
        for _ in parts(range(self.vectors)):
            vectors = [signs(leaf) for leaf in leaves]
            products = torch.autograd.grad(
                [gradients[i] for i in reached],
                leaves,
                [vectors[i] for i in reached],
                retain_graph=True,
                allow_unused=True,
            )
            traces = dict.fromkeys(map(id, taps), 0.0)
            for (tap, _), vector, product in zip(owned, vectors, products, strict=True):
                if product is not None:
                    traces[id(tap)] += float((vector * product).sum(dtype=torch.float64)) / samples
            count += 1
            change = (torch.tensor(list(traces.values()), dtype=torch.float64) - mean) / count
            mean = mean + change
            if count > 1 and change.abs().sum() <= self.tolerance * mean.abs().sum():
                break
        return [
            tap.values(float(trace), reading.group) for tap, trace in zip(taps, mean.clamp(min=0), strict=True)
        ], count


class _Leaves:
    """Taps a tensor: what the Hessian is taken with respect to, and the squared changes there."""

    def __init__(self, tensor: MeasuredTensor, samples: int) -> None:
        self.tensor = tensor
        self.samples = samples
        self.leaves: list[Tensor] = []
        self.forward_ended = False
        self._squares: Tensor | None = None  # (C, W)
        self._held: list[tuple[Tensor, Tensor]] = []
        tensor.quantizer.tap = self._weight if tensor.is_weight else self._activation

    def _weight(self, weight: Tensor) -> Tensor:
        self._check_forward()
        for known, leaf in self._held:
            if known.data_ptr() == weight.data_ptr():
                return leaf
        leaf = weight.detach().requires_grad_()
        self._held.append((weight, leaf))
        self.leaves.append(leaf)
        self.tensor.seen, self.tensor.numel = True, weight.numel()
        layout = self.tensor.layout
        squares = torch.stack([layout.rows(change.square()).sum(1) for change in self.tensor.changes(weight)], -1)
        self._squares = squares if self.tensor.channels > 1 else squares.sum(0, keepdim=True)
        return leaf

    def _activation(self, x: Tensor) -> Tensor:
        self._check_forward()
        for known, y in self._held:
            if known is x:
                return y
        leaf = torch.zeros_like(x, requires_grad=True)
        y = x + leaf
        self._held.append((x, y))
        self.leaves.append(leaf)
        self.tensor.seen, self.tensor.numel = True, x.numel() // self.samples
        exact = x.detach().float()
        errors = [self.tensor.rounded(exact, width).sub_(exact).square().sum() for width in self.tensor.widths]
        squares = torch.stack(errors)[None] / self.samples
        self._squares = squares if self._squares is None else self._squares + squares
        return y

    def _check_forward(self) -> None:
        if self.forward_ended:
            raise recomputed(self.tensor.name)

    def values(self, trace: float, group: int) -> tuple[Tensor, Tensor]:
        """Mean trace times squared change, of the whole and of groups of channels."""
        squares = torch.zeros(self.tensor.channels, len(self.tensor.widths)) if self._squares is None else self._squares
        found = squares.unsqueeze(0) * (trace / max(self.tensor.numel, 1))
        return found.sum(1), grouped(found, group)
