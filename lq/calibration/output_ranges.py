r"""Ranges by the output: of each layer or product of activations, the range with the least error of what it gives.

For the input x of a layer with the weight W (or both operands of a product), the step s is chosen by

    argmin_s  sum_t ||f(Q_s(x_t), Q(W)) - f(x_t, W)||^2 / ||f(x_t, W)||^2,

with x as the float network has it, W as it is quantized now, and the sum over tokens t (of convolutions, samples); then
the step of each output channel of W by the error of its channel, with x in float; three times in turn. The search is
that of PTQ4ViT (Yuan et al., ECCV 2022, arXiv:2111.12293), whose error is weighed by gradients instead. An error of the
values themselves says little of attention probabilities: many of them are tiny, and what they multiply averages the
errors.

What it brings, on ViT-tiny (float 85.5 %, 100 images): probabilities of 4 bits alone, uniform, keep 62 instead of 29 %.
With everything at 4 bits the second product of attention by its output keeps 19 instead of 12 % (200 images). For
layers, and for probabilities whose levels halve, it has brought nothing there: take it for products, by ``overrides``.

The candidates are factors of the range that the rule "auto" finds, wide apart at first, then closer around the best.
All candidates are tried in one pass over the samples, on what a layer reads at that moment; nothing is stored but one
sum for each candidate. An input that several layers read is chosen by the sum of their relative errors. Linear layers
are run on rows that are spread over the samples, convolutions on a few samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lq.attachment.float_models import float_model
from lq.attachment.interception import call_quantizers, watched_calls
from lq.attachment.padded import padded
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import input_quantizer, quantized_layers, weight_quantizer
from lq.attachment.tapping import rounded, tapped
from lq.bars import steps
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.histogram import Reduce
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.structure.forward import Forward, run, tensors_of
from lq.structure.places import call_of
from lq.structure.recomputation import without_recomputation

#: Samples that ranges are found on; of them, rows for a linear layer, and samples for products and convolutions.
SAMPLES, ROWS, FEW = 32, 1024, 8

# Logarithms to base 2 of the factors on a range, for each round: of activations, of weights.
_ROUNDS = (
    (torch.linspace(-5, 3, 9), torch.linspace(-1, 0.25, 6)),
    (torch.linspace(-0.75, 0.75, 7), torch.linspace(-0.15, 0.15, 5)),
    (torch.linspace(-0.15, 0.15, 5), torch.linspace(-0.05, 0.05, 3)),
)

# Tokens with less of the mean energy count less than others.
_LITTLE = 1e-3

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def by_output(quantizer: Quantizer) -> bool:
    """Whether its range is to be found by the output."""
    return quantizer.spec is not None and quantizer.spec.range == "output"


def fit_to_outputs(
    model: nn.Module, batches: Sequence[Any], forward: Forward | None = None, reduce: Reduce | None = None
) -> None:
    """Find ranges by the output, in place, for the quantizers whose spec has ``range="output"``.

    Weights that have channels of their own and are not of a linear layer or a convolution keep the range they have.

    Args:
        model: a model with quantizers, calibrated; left in the modes that it was in.
        batches: some batches, `SAMPLES` samples together.
        forward: how to run the model on a batch, as in `lq.calibrate`.
        reduce: combines a tensor over ranks, as in `lq.calibrate`.
    """
    units = [unit for unit in _units(model) if any(map(by_output, unit.parts))]
    kinds = (ActivationQuantizer, WeightQuantizer)
    stages = [(kind, offsets) for rounds in _ROUNDS for kind, offsets in zip(kinds, rounds, strict=True)]
    for kind, offsets in steps(stages, "Finding ranges by outputs", unit="round"):
        stage = _Stage(units, kind, offsets, len(batches))
        if not stage.searched:
            continue
        with _listening(model, stage):
            for batch in batches:
                run(model, batch, forward)
        stage.choose(reduce)


@dataclass(eq=False)
class _Unit:
    """A layer or a product of activations.

    Args:
        name: its name in the model.
        parts: its quantizers.
        layer: the layer; None: it is a call of a module.
        errors: sums of squared errors, by quantizer, of each candidate; weights, of each channel, too.
        norm: sum of squares of the output.
    """

    name: str
    parts: list[Quantizer]
    layer: nn.Module | None = None
    errors: dict[Quantizer, Tensor] = field(default_factory=dict)
    norm: float = 0.0


def _units(model: nn.Module) -> Iterator[_Unit]:
    """Layers and calls with quantizers; quantizers that several share are one."""
    for name, module in quantized_layers(model):
        both: tuple[Quantizer | None, ...] = (input_quantizer(module), weight_quantizer(module))
        parts = [part for part in both if part is not None]
        yield _Unit(name, parts, module)
    for name, module in model.named_modules():
        by_call: dict[str, list[Quantizer]] = {}
        for place, quantizer in call_quantizers(module).items():
            one = quantizer.owner if isinstance(quantizer, SharedQuantizer) else quantizer
            if isinstance(one, Quantizer) and not place.endswith("_output"):
                by_call.setdefault(call_of(place), []).append(one)
        for call, parts in by_call.items():
            yield _Unit(f"{name}.{call}".lstrip("."), parts)


class _Stage:
    """One round for the quantizers of one kind.

    Args:
        units: where they are.
        kind: of activations or of weights.
        offsets: what the candidates add to the logarithm of the step.
        batches: how many batches there are.
    """

    def __init__(self, units: Sequence[_Unit], kind: type[Quantizer], offsets: Tensor, batches: int) -> None:
        self.offsets = offsets.tolist()
        self.units = {unit.name: unit for unit in units}
        self.few, self.rows = max(FEW // batches, 1), max(ROWS // batches, 1)
        self.searched: dict[Quantizer, list[_Unit]] = {}
        self.inside = False
        for unit in units:
            unit.errors, unit.norm = {}, 0.0
            for part in unit.parts:
                if isinstance(part, kind) and by_output(part) and part.calibrated and _channels_known(part, unit):
                    shape = (len(offsets), part.bits.numel()) if part.is_weight else (len(offsets), 1)
                    unit.errors[part] = torch.zeros(shape, dtype=torch.double)
                    self.searched.setdefault(part, []).append(unit)

    def visit(self, units: Sequence[_Unit], compute: Callable[[], Any]) -> None:
        """Try all candidates on what a unit computes now; of fused attention, all its products at once."""
        parts = [part for unit in units for part in unit.parts if part.calibrated]
        self.inside = True
        try:
            with torch.no_grad():
                exact = _outputs(compute())
                weights = [_weight_of_rows(units[-1], y) for y in exact]
                for unit in units:
                    unit.norm += sum(weight.numel() for weight in weights)
                    for quantizer in unit.errors:
                        self._try(quantizer, unit, parts, list(zip(exact, weights, strict=True)), compute)
        finally:
            self.inside = False

    def _try(
        self,
        quantizer: Quantizer,
        unit: _Unit,
        parts: Sequence[Quantizer],
        exact: Sequence[tuple[Tensor, Tensor]],
        compute: Callable[[], Any],
    ) -> None:
        begin = quantizer.log2_step.clone()
        by_channel = quantizer.is_weight and quantizer.bits.ndim > 0
        try:
            # Weights by their own error alone: behind rounded activations, too small ones would seem best.
            chosen = [quantizer] if quantizer.is_weight else parts
            with tapped({part: partial(rounded, part) for part in chosen}):
                for index, offset in enumerate(self.offsets):
                    quantizer.log2_step.copy_(_moved(quantizer, begin, offset))
                    for (y, weight), value in zip(exact, _outputs(compute()), strict=True):
                        squares = value.float().sub_(y).square_().mul_(weight)
                        dim = _channel_dim(unit, squares)
                        rows = squares.movedim(dim, 0).reshape(squares.shape[dim], -1)
                        found = rows.sum(1) if by_channel else rows.sum()
                        unit.errors[quantizer][index] += found.double().cpu()
        finally:
            quantizer.log2_step.copy_(begin)

    @torch.no_grad()
    def choose(self, reduce: Reduce | None) -> None:
        """Take the best candidates of all ranks."""
        if reduce is not None:
            self._add_up(reduce)
        for quantizer, units in self.searched.items():
            reached = [unit for unit in units if unit.norm > 0]
            if not reached:
                continue
            # Channels are compared with themselves; an input, by its readers' relative errors.
            scale = [1.0 if quantizer.is_weight else unit.norm for unit in reached]
            total = torch.stack([unit.errors[quantizer] / s for unit, s in zip(reached, scale, strict=True)]).sum(0)
            best = torch.tensor(self.offsets, dtype=torch.float32)[_least(total)]
            begin = quantizer.log2_step
            offset = best.to(begin.device).view(begin.shape)
            quantizer.log2_step.copy_(_moved(quantizer, begin, offset))
            quantizer.refresh()

    def _add_up(self, reduce: Reduce) -> None:
        """Make sums those of all ranks."""
        units = list(dict.fromkeys(unit for units in self.searched.values() for unit in units))
        sums = [error for unit in units for error in unit.errors.values()]
        flat = torch.cat([*(s.flatten() for s in sums), torch.tensor([unit.norm for unit in units]).double()])
        device = next(iter(self.searched)).bits.device
        total = reduce(flat.to(device), "sum").cpu()
        of_errors, norms = total[: -len(units)], total[-len(units) :]
        for old, new in zip(sums, of_errors.split([s.numel() for s in sums]), strict=True):
            old.copy_(new.view(old.shape))
        for unit, norm in zip(units, norms.tolist(), strict=True):
            unit.norm = norm


def _least(total: Tensor) -> Tensor:
    """Index of the least error in each column; of equal ones, the first."""
    return total.argmin(0)


def _moved(quantizer: Quantizer, log2_step: Tensor, offset: float | Tensor) -> Tensor:
    moved = log2_step + offset
    return moved.round() if quantizer.spec is not None and quantizer.spec.power_of_two else moved


def _channels_known(part: Quantizer, unit: _Unit) -> bool:
    """Whether it is known which channel of the output is whose step."""
    return not part.is_weight or part.bits.ndim == 0 or isinstance(unit.layer, (nn.Linear, *_CONVOLUTIONS))


def _weight_of_rows(unit: _Unit, output: Tensor) -> Tensor:
    """The reciprocal of the energy of each token (of a convolution: sample), so that all count the same."""
    dims = list(range(1, output.ndim)) if isinstance(unit.layer, _CONVOLUTIONS) else [-1]
    energy = output.square().sum(dims, keepdim=True) if output.ndim else output.square()
    return 1 / (energy + _LITTLE * energy.mean()).clamp(min=torch.finfo(energy.dtype).tiny)


def _channel_dim(unit: _Unit, output: Tensor) -> int:
    """The dimension of an output that holds the channels."""
    kind = unit.layer
    if not isinstance(kind, _CONVOLUTIONS):
        return output.ndim - 1
    spatial = 3 if isinstance(kind, (nn.Conv3d, nn.ConvTranspose3d)) else 1 if _is_1d(kind) else 2
    return output.ndim - spatial - 1


def _is_1d(kind: nn.Module) -> bool:
    return isinstance(kind, (nn.Conv1d, nn.ConvTranspose1d))


def _outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [t.detach().float() for t in tensors_of(output) if t.is_floating_point() and t.layout == torch.strided]


@contextmanager
def _listening(model: nn.Module, stage: _Stage) -> Iterator[None]:
    """Run as the float network, and have the stage visit each unit that runs."""
    names = {id(module): name for name, module in model.named_modules()}

    def before(unit: _Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not stage.inside and unit.errors:
            args, kwargs = _some(stage, module, args, kwargs)
            stage.visit([unit], lambda: module(*_copied(args), **_copied(kwargs)))

    def call(module: nn.Module, keys: tuple[str, ...], compute: Callable[..., Any]) -> Any:
        prefix = names.get(id(module))
        units = [stage.units.get(f"{prefix}.{key}".lstrip(".")) for key in keys if prefix is not None]
        chain = [unit for unit in units if unit is not None]
        if not stage.inside and any(unit.errors for unit in chain):
            stage.visit(chain, partial(compute, stage.few))
        return compute()

    with ExitStack() as stack:
        for context in (float_model(model), padded(model), torch.no_grad(), without_recomputation(model)):
            stack.enter_context(context)
        for unit in stage.units.values():
            if unit.layer is not None:
                handle = unit.layer.register_forward_pre_hook(partial(before, unit), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(watched_calls(call))
        yield


def _copied(value: Any) -> Any:
    """For a layer that works in place."""
    return _pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, value)


def _some(stage: _Stage, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What a layer is called with, or evenly spaced parts of it, where it is known that it works on each alone."""
    x = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(x, Tensor):
        return args, kwargs
    plain = "forward" not in vars(module) and type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Linear) and plain:
        x = x.reshape(-1, x.shape[-1])
        return (x[:: max(len(x) // stage.rows, 1)],), kwargs
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and x.ndim == 4:
        return (x[: stage.few],), kwargs
    return args, kwargs
