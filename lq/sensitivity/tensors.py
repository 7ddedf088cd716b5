"""The tensors whose widths are measured: one per quantizer, and the state in which a model is measured."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lq.attachment.sites import quantizers
from lq.errors import StateError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.log_quantizer import LogQuantizer
from lq.quantizer.rounding import round_to_grid
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.sensitivity.contraction import by_sample
from lq.structure.channels import ChannelLayout

# Changes of a weight are kept between batches if all of them together are below this, in bytes.
_KEEP = 2 << 30
# Elements of an activation that are rounded at a time, all widths in turn: they should stay in a cache.
_BLOCK = 1 << 20


class MeasuredTensor:
    """A quantizer, the widths to measure, and what one batch has shown of them.

    Args:
        quantizer: of a weight or an activation.
        widths: in bits.
        keep: whether to keep the changes of the weight.
    """

    def __init__(self, quantizer: WeightQuantizer | ActivationQuantizer, widths: Sequence[int], keep: bool) -> None:
        self.quantizer = quantizer
        self.widths = tuple(widths)
        self.name = quantizer.name
        self.is_weight = isinstance(quantizer, WeightQuantizer)
        self.channels = max(quantizer.bits.numel(), 1) if self.is_weight else 1
        self.numel = 0  # of the tensor; of one sample, for activations
        self.seen = False
        self.samples_last = False  # rows hold the samples in turn
        self.terms: Tensor | None = None  # (samples, channels, widths), of the batch
        self._keep = keep
        self._kept: Tensor | None = None
        self._grids: tuple[list[list[float]], Tensor] | None = None
        self._weight_grids: dict[int, tuple[Tensor, Tensor]] = {}  # by width, of the weight of this mark
        self._mark: Tensor | None = None

    @property
    def layout(self) -> ChannelLayout:
        """Where the channels of the weight lie.

        Raises:
            StateError: if it is an activation.
        """
        if isinstance(self.quantizer, WeightQuantizer):
            return self.quantizer.layout
        raise StateError(f"{self.name} is an activation, which has no channels of its own")

    def add(self, terms: Tensor) -> None:
        """Add what one use of the tensor contributes: (samples, channels of the layer, widths)."""
        if terms.shape[1] != self.channels:
            terms = terms.sum(1, keepdim=True)
        self.terms = terms if self.terms is None else self.terms + terms

    def changes(self, weight: Tensor) -> Tensor:
        """The rounding error of the weight at each width, (W, *weight.shape); float32 at least."""
        if self._kept is not None:
            return self._kept
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if isinstance(self.quantizer, WeightQuantizer):
            grids = self._grids_of(self.quantizer, weight, self.widths)
            each = [self.quantizer.rounded_at(weight, *grid) for grid in grids.items()]
        else:
            each = [self.rounded(weight, width) for width in self.widths]
        found = torch.stack(each).sub_(weight)
        if self._keep:
            self._kept = found
        return found

    def rounded(self, tensor: Tensor, width: int) -> Tensor:
        """The tensor at one of the widths, with the range of that width."""
        if isinstance(self.quantizer, WeightQuantizer):
            return self.quantizer.rounded_at(tensor, width, self._grids_of(self.quantizer, tensor, [width])[width])
        if isinstance(self.quantizer, LogQuantizer):
            return self.quantizer.rounded_at(tensor, width)
        step, low, high = (part[self.widths.index(width)] for part in self._grid()[0])
        size = torch.full((), step, device=tensor.device, dtype=tensor.dtype)
        return round_to_grid(tensor, size, low, high, low % 1.0)

    def _grids_of(
        self, quantizer: WeightQuantizer, weight: Tensor, widths: Sequence[int]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The grids of the weight by width, found once for as long as its channels stay the same."""
        rows = quantizer.rows(weight)
        mark = torch.stack([rows.amin(1), rows.amax(1), rows.sum(1)])
        if self._mark is None or not torch.equal(mark, self._mark):
            self._mark, self._weight_grids = mark, {}
        for width in widths:
            if width not in self._weight_grids:
                self._weight_grids[width] = quantizer.grid_at(weight, width)
        return {width: self._weight_grids[width] for width in widths}

    def activation_terms(self, x: Tensor, delta: Tensor, samples: int) -> Tensor:
        """``<delta, rounded(x) - x>`` of each sample at each width, (samples, 1, W)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, deltas = (by_sample(t.detach().to(dtype), samples, self.samples_last).flatten(1) for t in (x, delta))
        if isinstance(self.quantizer, LogQuantizer):
            changes = (self.quantizer.rounded_at(rows, width).sub_(rows) for width in self.widths)
            return torch.stack([change.mul_(deltas).sum(1) for change in changes], 1).unsqueeze(1)
        numbers, steps = self._grid()
        grids = list(zip(*numbers, strict=True))
        columns = min(rows.shape[1], max(1, _BLOCK // len(grids)))
        height = max(1, _BLOCK // (len(grids) * max(columns, 1)))
        buffer = torch.empty(min(height, samples), len(grids), columns, dtype=dtype, device=x.device)
        found = torch.zeros(samples, len(grids), dtype=dtype, device=x.device)
        for start in range(0, samples, height):
            some = slice(start, start + height)
            for block, weight in zip(rows[some].split(columns, 1), deltas[some].split(columns, 1), strict=True):
                codes = buffer[: len(block), :, : block.shape[1]]
                for column, (step, low, high) in enumerate(grids):
                    code = torch.mul(block, 1 / step, out=codes[:, column])
                    code = code.sub_(0.5).round_().add_(0.5) if low % 1.0 else code.round_()
                    code.clamp_(low, high)
                found[some] += codes.mul_(weight.unsqueeze(1)).sum(2)
        kept = (rows * deltas).sum(1, keepdim=True)
        if steps.device != found.device:  # a model that was moved after calibration
            steps = steps.to(found.device)
            self._grids = numbers, steps
        return (found * steps.to(dtype) - kept).unsqueeze(1)

    def _grid(self) -> tuple[list[list[float]], Tensor]:
        """Step, lowest and highest level of an activation at each width, as numbers; the steps as a tensor, too."""
        if self._grids is None and isinstance(self.quantizer, ActivationQuantizer):
            found = self.quantizer.grids(self.widths)
            self._grids = torch.stack(found).tolist(), found[0]
        if self._grids is None:
            raise StateError(f"{self.name} is a weight; its grid is found anew for each value")
        return self._grids


def find_tensors(
    model: nn.Module, widths: Sequence[int], *, weights: bool = True, activations: bool = True
) -> list[MeasuredTensor]:
    """One for each quantizer of a model, once each, in the model's order."""
    found: list[WeightQuantizer | ActivationQuantizer] = [
        q
        for q in quantizers(model)
        if (isinstance(q, WeightQuantizer) and weights)
        or (isinstance(q, ActivationQuantizer) and activations and not q.unreached)
    ]
    stored = sum(p.numel() for p in model.parameters()) * 4 * len(widths)
    return [MeasuredTensor(q, widths, stored <= _KEEP) for q in found]
