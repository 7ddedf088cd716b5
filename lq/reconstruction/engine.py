"""The loop that fits one unit: rounding, drop, loss and learned steps are parts of it.

``min over rounding and steps of loss(unit(x~), z)``, with x~ the input from the quantized network, z the output of the
float one. What is learned are two vectors, whatever the number of layers: one for the rounding of all weights of the
unit, one for the steps of its activations; and its biases, if asked for. The loop asks the device for no number and
makes no copies but of the batch. Weights and steps are written into the model when it is done; biases are learned in
place, and put back if it fails.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import DivergenceError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.functional import fake_quantize
from lq.quantizer.histogram import Reduce
from lq.reconstruction.capture import call
from lq.reconstruction.drop import random_mask
from lq.reconstruction.method import Data, Fitted, Inside, Method
from lq.reconstruction.quantizers import UnitQuantizers, feedback_levels, refit_ranges, tapped
from lq.reconstruction.rounding import WeightGrid

# Points of a loss curve.
_POINTS = 100


def fit_unit(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    data: Data,
    method: Method,
    *,
    samples: int,
    seed: int,
    before: float | None = None,
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
        before: the loss now, if it is known.
        inside: what else is compared, given a regularization.
        reduce: combines a tensor over ranks.
        ranks: number of ranks.
        progress: wraps the steps, to show them.

    Raises:
        DivergenceError: if the loss is not a number in the end.
    """
    grid = WeightGrid(quantizers.weights)
    if method.start == "feedback":
        grid.prefer(feedback_levels(modules, quantizers, grid, data.inputs, samples, method.batch_size, reduce))
    device = data.inputs.device
    if before is None:
        before = mean_loss(modules, data, method, samples, reduce, ranks)
    fitting = _Fitting(modules, quantizers, data, grid, method, torch.Generator(device).manual_seed(seed), inside)
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
    after = mean_loss(modules, data, method, samples, reduce, ranks)
    if not after <= before:
        undo()
        after = before
    points = curve[: max(1, taken * len(curve) // method.iterations)].tolist() if taken else []
    return Fitted(before, after, points, taken)


class _Fitting:
    """What is learned of a unit, and one step of it."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        quantizers: UnitQuantizers,
        data: Data,
        grid: WeightGrid,
        method: Method,
        generator: torch.Generator,
        inside: Inside | None,
    ) -> None:
        self.modules = modules
        self.run: Callable[..., Tensor] = call
        if method.compile:
            torch.compiler.reset()  # else units count as recompilations of one function, of which there may be few
            self.run = torch.compile(call)
        self.inside = inside if method.regularization else None
        self.differ = [False] * len(data.inputs.leaves)  # which arguments are others than in the float network
        if data.float_inputs is not data.inputs:
            first = (inputs.batch(slice(0, method.batch_size)) for inputs in (data.inputs, data.float_inputs))
            self.differ = [isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(*first, strict=True)]
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
        rounded = self.rounding.parameters if grid.values.numel() else []  # none if all weights are another unit's
        if rounded:
            groups.append({"params": rounded, "lr": lr})
        if self.log2_steps is not None:
            groups.append({"params": [self.log2_steps], "lr": step_lr})
        self.biases = quantizers.biases if method.bias_lr else []
        self.masters = [bias.detach().float().clone() for bias in self.biases]  # small steps of half-precision biases
        if self.biases:
            groups.append({"params": self.masters, "lr": method.bias_lr})
        self.moved = [parameter for group in groups for parameter in group["params"]]
        self.parameters = [*self.moved[: len(self.moved) - len(self.masters)], *self.biases]
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
            try:
                yield
            except BaseException:
                self._restore_biases()
                raise

    def step(self, step: int, index: Tensor, data: Data, reduce: Reduce | None, ranks: int) -> Tensor:
        """One step of the optimizer; returns the loss, without the penalty, on the device."""
        method = self.method
        done = step / method.iterations
        self._drop = method.drop(done)
        self.rounding.advance(done)
        leaves, float_leaves = data.inputs.batch(index), None
        if self._drop > 0 or self.inside is not None:
            float_leaves = data.float_inputs.batch(index)
            pairs = zip(leaves, float_leaves, self.differ, strict=True)
            leaves = [self._mixed(q, x) if differ else q for q, x, differ in pairs]
        if self.inside is not None and float_leaves is not None:
            for outputs in self._outputs:
                outputs.clear()
            with torch.no_grad():
                call(self.inside.float_modules, float_leaves, data.inputs.spec)
        with torch.enable_grad():
            self._weights = self.grid.tensors(self.rounding.levels())
            self._steps = () if self.log2_steps is None else self.log2_steps.unbind()
            with torch.compiler.set_stance("default" if method.compile else "force_eager"):
                output = self.run(self.modules, leaves, data.inputs.spec)
            weights = None if data.weights is None else data.weights.batch(index)
            loss = method.loss(output, data.targets.batch(index), weights)
            if self.inside is not None:
                inner = [(a, b) for a, b in zip(*self._outputs, strict=True) if a is not output]  # that has its loss
                if inner:
                    loss = loss + method.regularization * self.inside.difference(inner)
            penalty = self.rounding.penalty()
            total = loss if penalty is None else loss + penalty
            if self.optimizer is None or not total.requires_grad:
                return loss.detach()
            grads = torch.autograd.grad(total, self.parameters, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g.float() for p, g in zip(self.parameters, grads, strict=True)]
        if reduce is not None and ranks > 1:
            flat = reduce(torch.cat([grad.reshape(-1) for grad in found]), "sum") / ranks
            parts = flat.split([grad.numel() for grad in found])
            found = [part.view_as(grad) for part, grad in zip(parts, found, strict=True)]
        for moved, grad in zip(self.moved, found, strict=True):
            moved.grad = grad.to(moved.dtype)
        first = 1 if self.grid.values.numel() and self.rounding.parameters else 0  # the rounding's rate is constant
        for group, peak in zip(self.optimizer.param_groups[first:], self._peaks[first:], strict=True):
            group["lr"] = peak * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.step()
        with torch.no_grad():
            for bias, master in zip(self.biases, self.masters, strict=True):
                bias.copy_(master)
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
        self._restore_biases()
        return False

    @torch.no_grad()
    def _restore_biases(self) -> None:
        for bias, old in zip(self.biases, self._old_biases, strict=True):
            bias.copy_(old)

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


def _release(parameter: Tensor) -> None:
    parameter.requires_grad_(False).grad = None


@torch.no_grad()
def refit_ranges_if_better(
    modules: Sequence[nn.Module],
    quantizers: UnitQuantizers,
    data: Data,
    method: Method,
    samples: int,
    reduce: Reduce | None,
    ranks: int,
) -> float | None:
    """`refit_ranges`, unless the loss of the unit is less with the steps it has, such as learned ones.

    Returns:
        The loss now; None if it is not known. Arguments are those of `fit_unit`.
    """
    kept = [(part, part.log2_step.clone(), part.zero_point.clone()) for part in quantizers.learned]
    present = mean_loss(modules, data, method, samples, reduce, ranks)
    refit_ranges(modules, quantizers, data.float_inputs, samples, method.batch_size, reduce)
    if method.activation_mode == "float":
        return None  # activations pass meanwhile: the loss does not tell
    found = mean_loss(modules, data, method, samples, reduce, ranks)
    if found <= present:
        return found
    for part, log2_step, zero_point in kept:
        part.log2_step.copy_(log2_step)
        part.zero_point.copy_(zero_point)
        part.refresh()
    return present


@torch.no_grad()
def mean_loss(
    modules: Sequence[nn.Module], data: Data, method: Method, samples: int, reduce: Reduce | None, ranks: int
) -> float:
    """The loss over all samples, of the unit as it is in the model; arguments as those of `fit_unit`."""
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
