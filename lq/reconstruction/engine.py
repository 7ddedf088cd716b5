"""The loop that fits one unit: rounding, drop, loss and learned steps are parts of it.

``min over rounding and steps of loss(unit(x~), z)``, with x~ the input from the quantized network, z the output of the
float one. What is learned are two vectors, whatever the number of layers: one for the rounding of all weights of the
unit, one for the steps of its activations. The loop asks the device for no number, makes no copies but of the batch,
and leaves the parameters of the model alone until it is done.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lq.errors import DivergenceError
from lq.functional import fake_quantize
from lq.histogram import Reduce
from lq.interception import SharedQuantizer
from lq.quantizer import ActivationQuantizer, WeightQuantizer
from lq.reconstruction.capture import Inputs, Outputs, call
from lq.reconstruction.drop import Drop, random_mask
from lq.reconstruction.losses import Loss, LpLoss
from lq.rounding import Rounding, WeightGrid
from lq.rounding.feedback import Correlation
from lq.sites import float_weight, weight_quantizer

#: Where the rounding starts: at the float weights, or nearer to what error feedback chooses.
Start = Literal["float", "feedback"]

#: What becomes of the activations of a unit while it is fitted.
Activations = Literal["learned", "quantized", "float"]

# Points of a loss curve.
_POINTS = 100


@dataclass(frozen=True)
class Method:
    """How a unit is fitted.

    Args:
        rounding: how the levels of weights are chosen.
        loss: between the unit's output and the float one.
        drop: share of activations that stay float, by progress.
        iterations: steps of the optimizer.
        batch_size: samples in a step, over all ranks.
        activation_mode: "learned" (their steps are learned along), "quantized" (with the steps they have) or "float".
        step_lr: learning rate of the logarithm of activation steps, for Adam; falls to 0 as a cosine; None: by the
            number of iterations.
        early_stop: end when the loss falls no further and the rounding is decided.
        regularization: weight of the squared differences of activations inside of the unit (NWQ).
        bias_lr: learning rate of the biases, for Adam; falls to 0 as a cosine; 0: they stay.
        start: where the rounding starts: at the "float" weights, or nearer to what error "feedback" chooses.
    """

    rounding: Rounding
    loss: Loss
    drop: Drop
    iterations: int = 20_000
    batch_size: int = 32
    activation_mode: Activations = "learned"
    step_lr: float | None = None
    early_stop: bool = False
    regularization: float = 0.0
    bias_lr: float = 0.0
    start: Start = "float"

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the rounding and of the steps.

        What is learned has to go a certain way in however many steps there are. The constants of the papers, 1e-3 and
        about 1e-4 for 20 000 iterations, are ten times as large for 2 000 and fewer.
        """
        share = min(max(20_000 / self.iterations, 1.0), 10.0)
        lr, step_lr = self.rounding.lr, self.step_lr
        return 1e-3 * share if lr is None else lr, 1e-4 * share if step_lr is None else step_lr


@dataclass
class Fitted:
    """What came of a unit.

    Args:
        before: loss over all samples with nearest rounding and the steps before.
        after: loss over all samples now.
        curve: loss of single batches on the way, evenly spaced.
        iterations: steps that were taken.
    """

    before: float
    after: float
    curve: list[float]
    iterations: int


@dataclass
class Data:
    """All samples of a unit.

    Args:
        inputs: from the network quantized so far.
        float_inputs: from the float network.
        targets: what the float unit makes of them.
        weights: squared gradients at the output, for losses that weigh by them.
    """

    inputs: Inputs
    float_inputs: Inputs
    targets: Outputs
    weights: Outputs | None = None


@dataclass
class Inside:
    """Activations inside of a unit, to be held near those of the float network.

    Args:
        float_modules: the unit in the float network.
        pairs: modules inside of the unit, in the quantized and in the float network, whose outputs are compared.
    """

    float_modules: Sequence[nn.Module]
    pairs: Sequence[tuple[nn.Module, nn.Module]]

    def difference(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The sum of squared differences, each summed over channels and averaged over the rest."""
        return torch.stack([_SQUARED(a, b, None) for a, b in zip(outputs, targets, strict=True)]).sum()


_SQUARED = LpLoss(2.0)


class UnitQuantizers:
    """The quantizers of a unit.

    Args:
        modules: the modules of the unit.
        done: identities of weights and quantizers that earlier units have settled.
    """

    def __init__(self, modules: Sequence[nn.Module], done: set[int]) -> None:
        inside = [part for module in modules for part in module.modules()]
        weights: dict[int, tuple[WeightQuantizer, nn.Parameter]] = {}
        for part in inside:
            quantizer, weight = weight_quantizer(part), float_weight(part)
            if quantizer is not None and weight is not None and id(weight) not in done:
                weights.setdefault(id(weight), (quantizer, weight))
        owners = [part.owner for part in inside if isinstance(part, SharedQuantizer)]
        found = [*(part for part in inside if isinstance(part, ActivationQuantizer)), *owners]
        self.activations = list({id(part): part for part in found}.values())
        self.weights = list(weights.values())
        self.learned = [part for part in self.activations if id(part) not in done]
        layers = [part for part in inside if any(float_weight(part) is weight for _, weight in self.weights)]
        biases = [part._parameters.get("bias") for part in layers]
        self.biases = list({id(bias): bias for bias in biases if bias is not None and id(bias) not in done}.values())

    def settled(self) -> set[int]:
        """Identities of what this unit decides."""
        return {id(part) for part in (*(weight for _, weight in self.weights), *self.learned, *self.biases)}


def fit_unit(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    data: Data,
    method: Method,
    *,
    samples: int,
    seed: int,
    inside: Inside | None = None,
    reduce: Reduce | None = None,
    ranks: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> Fitted:
    """Fit the rounding of a unit's weights and the steps of its activations, and write them into the model.

    Args:
        modules: the modules of the unit, in eval mode; their parameters need no gradients.
        quantizers: its quantizers.
        data: captured inputs and targets.
        method: how.
        samples: number of samples on this rank.
        seed: of the order of samples and of what is dropped.
        inside: what else is compared, given a regularization.
        reduce: combines a tensor over ranks.
        ranks: number of ranks.
        progress: wraps the steps, to show them.

    Raises:
        DivergenceError: if the loss is not a number in the end.
    """
    grid = WeightGrid(quantizers.weights)
    if method.start == "feedback":
        grid.prefer(_feedback(modules, quantizers, grid, data.inputs, samples, method.batch_size, reduce))
    device = data.inputs.device
    before = _mean_loss(modules, data, method, samples, reduce, ranks)
    fitting = _Fitting(modules, quantizers, grid, method, torch.Generator(device).manual_seed(seed), inside)
    order = _order(samples, method.iterations, max(1, method.batch_size // ranks), seed)
    if device.type == "cuda":
        order = order.pin_memory()  # so that nobody waits for its way to the device
    curve = torch.zeros(min(_POINTS, method.iterations), device=device)
    taken = 0
    with fitting.taps():
        for step in progress(range(method.iterations if fitting.parameters else 0)):
            loss = fitting.step(step, order[step], data, reduce, ranks)
            curve[step * len(curve) // method.iterations] = loss
            taken = step + 1
            if method.early_stop and fitting.is_settled(step, curve, reduce, ranks):
                break
    if not fitting.is_finite():
        last = float(curve[max(0, taken * len(curve) // method.iterations - 1)])
        raise DivergenceError(
            f"reconstruction diverged: after {taken} steps the loss is {last}, it was {before}; "
            "lower step_lr, bias_lr or the lr of the rounding"
        )
    undo = fitting.write()
    after = _mean_loss(modules, data, method, samples, reduce, ranks)
    if not after <= before:
        undo()
        after = before
    points = curve[: max(1, taken * len(curve) // method.iterations)].tolist() if method.iterations else []
    return Fitted(before, after, points, taken)


class _Fitting:
    """What is learned of a unit, and one step of it."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        quantizers: UnitQuantizers,
        grid: WeightGrid,
        method: Method,
        generator: torch.Generator,
        inside: Inside | None,
    ) -> None:
        self.modules = modules
        self.inside = inside if method.regularization else None
        self.quantizers = quantizers
        self.grid = grid
        self.method = method
        self.generator = generator
        self.rounding = method.rounding.begin(grid)
        learned = quantizers.learned if method.activation_mode == "learned" else []
        steps = [quantizer.log2_step.detach() for quantizer in learned]
        self.log2_steps = torch.stack(steps).requires_grad_() if steps else None
        groups: list[dict[str, Any]] = []
        lr, step_lr = method.rates
        if self.rounding.parameters:
            groups.append({"params": self.rounding.parameters, "lr": lr})
        if self.log2_steps is not None:
            groups.append({"params": [self.log2_steps], "lr": step_lr})
        self.biases = quantizers.biases if method.bias_lr else []
        if self.biases:
            groups.append({"params": self.biases, "lr": method.bias_lr})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.Adam(groups, fused=True) if groups else None
        self._peaks = [group["lr"] for group in groups]
        self._old_biases = [bias.detach().clone() for bias in self.biases]
        self.learned = {id(quantizer): i for i, quantizer in enumerate(learned)}
        self._weights: list[Tensor] = []
        self._steps: Sequence[Tensor] = ()
        self._drop = 0.0
        self._outputs: tuple[list[Tensor], list[Tensor]] = ([], [])  # inside, of the quantized and of the float unit

    @contextmanager
    def taps(self) -> Iterator[None]:
        """Have the unit's quantizers give what is being learned."""
        with ExitStack() as stack:
            for i, (quantizer, _) in enumerate(self.quantizers.weights):
                stack.enter_context(tapped(quantizer, self._weight(i)))
            for part in self.quantizers.activations:
                stack.enter_context(tapped(part, self._activation(part)))
            for pair in self.inside.pairs if self.inside else ():
                for module, outputs in zip(pair, self._outputs, strict=True):
                    handle = module.register_forward_hook(lambda _, __, output, to=outputs: to.append(output))
                    stack.callback(handle.remove)
            for bias in self.biases:
                stack.callback(_release, bias.requires_grad_(True))
            yield

    def step(self, step: int, index: Tensor, data: Data, reduce: Reduce | None, ranks: int) -> Tensor:
        """One step of the optimizer; returns the loss, without the penalty, on the device."""
        method = self.method
        done = step / method.iterations
        self._drop = method.drop(done)
        self.rounding.advance(done)
        leaves, float_leaves = data.inputs.batch(index), None
        if self._drop > 0 or self.inside is not None:
            float_leaves = data.float_inputs.batch(index)
            leaves = [self._mixed(q, x) for q, x in zip(leaves, float_leaves, strict=True)]
        if self.inside is not None and float_leaves is not None:
            for outputs in self._outputs:
                outputs.clear()
            with torch.no_grad():
                call(self.inside.float_modules, float_leaves, data.inputs.spec)
        with torch.enable_grad():
            self._weights = self.grid.tensors(self.rounding.levels())
            self._steps = () if self.log2_steps is None else self.log2_steps.unbind()
            output = call(self.modules, leaves, data.inputs.spec)
            weights = None if data.weights is None else data.weights.batch(index)
            loss = method.loss(output, data.targets.batch(index), weights)
            if self.inside is not None:
                loss = loss + method.regularization * self.inside.difference(*self._outputs)
            penalty = self.rounding.penalty()
            total = loss if penalty is None else loss + penalty
            if self.optimizer is None:
                return loss.detach()
            grads = torch.autograd.grad(total, self.parameters, allow_unused=True)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = torch.zeros_like(parameter) if grad is None else grad
            if reduce is not None and ranks > 1:
                parameter.grad = reduce(parameter.grad, "sum") / ranks
        first = 1 if self.rounding.parameters else 0  # the rounding's own rate is constant
        for group, peak in zip(self.optimizer.param_groups[first:], self._peaks[first:], strict=True):
            group["lr"] = peak * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.step()
        return loss.detach()

    def is_settled(self, step: int, curve: Tensor, reduce: Reduce | None, ranks: int) -> bool:
        """Whether to stop early; asked now and then, because the answer has to come from the device."""
        every = max(1, self.method.iterations // 20)
        if (step + 1) % every or step + 1 < 4 * every:
            return False
        point = (step + 1) * len(curve) // self.method.iterations
        width = max(1, every * len(curve) // self.method.iterations)
        losses = torch.stack([curve[point - width : point].mean(), curve[point - 2 * width : point - width].mean()])
        if reduce is not None and ranks > 1:  # the ranks have to agree
            losses = reduce(losses, "sum")
        falls = losses[0] < 0.99 * losses[1]
        with torch.no_grad():
            undecided = ((self.rounding.levels() - self.rounding.hard_levels()).abs() > 0.05).float().mean()
        return not bool(falls) and bool(undecided < 1e-3)

    def is_finite(self) -> bool:
        """Whether all that was learned are numbers; if not, biases are what they were."""
        if all(bool(parameter.detach().isfinite().all()) for parameter in self.parameters):
            return True
        with torch.no_grad():
            for bias, old in zip(self.biases, self._old_biases, strict=True):
                bias.copy_(old)
        return False

    @torch.no_grad()
    def write(self) -> Callable[[], None]:
        """Put into the model what was learned; returns a function that takes it back."""
        weights = [weight.detach().clone() for weight in self.grid.weights]
        parts = [part for part in self.quantizers.learned if id(part) in self.learned]
        steps = [part.log2_step.detach().clone() for part in parts]
        self.grid.write(self.rounding.hard_levels())
        for part in parts:
            part.log2_step.copy_(self.log2_steps[self.learned[id(part)]])  # type: ignore[index]
            part.refresh()

        def undo() -> None:
            with torch.no_grad():
                for weight, old in zip(self.grid.weights + self.biases, weights + self._old_biases, strict=True):
                    weight.copy_(old)
                grid = WeightGrid(self.quantizers.weights)
                grid.write(grid.nearest())
                for part, old in zip(parts, steps, strict=True):
                    part.log2_step.copy_(old)
                    part.refresh()

        return undo

    def _weight(self, i: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: self._weights[i].to(weight.dtype)

    def _activation(self, part: ActivationQuantizer) -> Callable[[Tensor], Tensor]:
        if self.method.activation_mode == "float":
            return lambda x: x
        bounds, own = part.bounds, part.log2_step.detach()
        position = self.learned.get(id(part))

        def quantize(x: Tensor) -> Tensor:
            step = own if position is None else self._steps[position]
            return fake_quantize(x, step, *bounds, kept=random_mask(x, self._drop, self.generator))

        return quantize

    def _mixed(self, quantized: Any, whole: Any) -> Any:
        """Elements of the float network's input in place of some of the quantized one's."""
        if not isinstance(quantized, Tensor) or not quantized.is_floating_point():
            return quantized
        mask = random_mask(quantized, self._drop, self.generator)
        return quantized if mask is None else torch.lerp(quantized, whole, mask.to(quantized.dtype))


@torch.no_grad()
def _feedback(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    grid: WeightGrid,
    inputs: Inputs,
    samples: int,
    batch_size: int,
    reduce: Reduce | None,
) -> Tensor:
    """The levels that error feedback chooses, (W,); the nearest ones of layers it does not know."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    seen = {id(weight): Correlation(part) for part in parts if (weight := float_weight(part)) is not None}
    with ExitStack() as stack:
        for part in parts:
            to = seen[id(float_weight(part))]
            stack.callback(part.register_forward_hook(lambda _, args, __, to=to: to.add(args[0])).remove)
        for start in range(0, samples, batch_size):
            call(modules, inputs.batch(slice(start, min(start + batch_size, samples))), inputs.spec)
    levels = []
    flat = (grid.values, *(torch.as_tensor(b, device=grid.values.device).expand_as(grid.values) for b in grid.bounds))
    rows = zip(*(grid.split(part) for part in (*flat, grid.nearest())), strict=True)
    for (_, weight), (values, low, high, offset, nearest) in zip(quantizers.weights, rows, strict=True):
        found = seen.get(id(weight))
        if found is None or found.total is None:
            levels.append(nearest.reshape(-1))
            continue
        if reduce is not None:
            found.total = reduce(found.total, "sum")
        levels.append(found.levels(*(part.flatten(1) for part in (values, low, high, offset))).reshape(-1))
    return torch.cat(levels) if levels else grid.values


def _release(parameter: Tensor) -> None:
    parameter.requires_grad_(False).grad = None


@torch.no_grad()
def refit_ranges(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    inputs: Inputs,
    samples: int,
    batch_size: int,
    reduce: Reduce | None,
) -> None:
    """Fit the ranges of a unit's activations to those of the float network, which it is to be near to.

    Args:
        modules: the modules of the unit.
        quantizers: its quantizers; those that an earlier unit has settled keep their range.
        inputs: from the float network.
        samples: number of samples on this rank.
        batch_size: samples to run at a time.
        reduce: combines a tensor over ranks.
    """
    with ExitStack() as stack:
        for quantizer in [q for q, _ in quantizers.weights] + quantizers.activations:
            stack.enter_context(tapped(quantizer, lambda x: x))
        observed = [part.observe() for part in quantizers.learned]
        for start in range(0, samples, batch_size):
            call(modules, inputs.batch(slice(start, min(start + batch_size, samples))), inputs.spec)
    for part, histogram in zip(quantizers.learned, observed, strict=True):
        if reduce is not None:
            histogram.reduce(reduce, part.bits.device)
        if histogram.counts is not None:
            part.calibrate(histogram)


@contextmanager
def tapped(quantizer: WeightQuantizer | ActivationQuantizer, tap: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a quantizer return what `tap` makes of its tensor."""
    before, quantizer.tap = quantizer.tap, tap
    try:
        yield
    finally:
        quantizer.tap = before


@torch.no_grad()
def _mean_loss(
    modules: Sequence[nn.Module], data: Data, method: Method, samples: int, reduce: Reduce | None, ranks: int
) -> float:
    """The loss over all samples, of the unit as it is in the model."""
    total = torch.zeros((), device=data.inputs.device)
    for start in range(0, samples, method.batch_size):
        rows = slice(start, min(start + method.batch_size, samples))
        output = call(modules, data.inputs.batch(rows), data.inputs.spec)
        weights = None if data.weights is None else data.weights.batch(rows)
        total += method.loss(output, data.targets.batch(rows), weights) * (rows.stop - rows.start)
    total /= samples
    return float(total if reduce is None or ranks == 1 else reduce(total, "sum") / ranks)


def _order(samples: int, iterations: int, batch_size: int, seed: int) -> Tensor:
    """Samples of each step, (iterations, batch size): one permutation of all after the other."""
    generator = torch.Generator().manual_seed(seed)
    needed = iterations * batch_size
    epochs = [torch.randperm(samples, generator=generator) for _ in range(math.ceil(needed / max(samples, 1)))]
    flat = torch.cat(epochs) if epochs else torch.zeros(0, dtype=torch.int64)
    return flat[:needed].view(iterations, batch_size)
