"""The loop that fits one unit: rounding, drop, loss and learned steps are parts of it.

``min over rounding and steps of loss(unit(x~), z)``, with x~ the input from the quantized network, z the output of the
float one. What is learned are two vectors, whatever the number of layers: one for the rounding of all weights of the
unit, one for the steps of its activations; and its biases, if asked for. The loop asks the device for no number and
makes no copies but of the batch. Weights and steps are written into the model when it is done; biases are learned in
place, and put back if it fails.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lq.bars import parts
from lq.errors import DivergenceError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.reconstruction.capture import call
from lq.reconstruction.drop import random_mask
from lq.reconstruction.feedback import feedback_levels
from lq.reconstruction.objective import over
from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import Problem, Solution, mean_loss
from lq.reconstruction.quantizers import tapped
from lq.reconstruction.rounding import WeightGrid

# Points of a loss curve.
_POINTS = 100
# Iterations that are run to measure how long one takes.
_TRIED = 4


def fit_unit(problem: Problem, options: RunOptions, *, seed: int, before: float | None = None) -> Solution:
    """Fit the rounding of a unit's weights and the steps of its activations, and write them into the model.

    Args:
        problem: the unit, its inputs and targets.
        options: how.
        seed: of the order of samples and of what is dropped.
        before: the loss now, if it is known.

    Raises:
        DivergenceError: if the loss is not a number in the end.
    """
    grid = WeightGrid(problem.quantizers.weights)
    if options.start == "feedback":
        grid.prefer(feedback_levels(problem, grid, options))
    device = problem.inputs.device
    if before is None:
        before = mean_loss(problem, options)
    fit = _Fit(problem, grid, options, torch.Generator(device).manual_seed(seed))
    fit.first = before if options.over_first and before > 0 else 1.0
    order = _order(problem.samples, options.iterations, max(1, options.batch_size // options.ranks), seed)
    if device.type == "cuda":
        order = order.pin_memory()  # so that nobody waits for its way to the device
    curve = torch.zeros(min(_POINTS, options.iterations), device=device)
    taken = 0
    with fit.taps():
        for step in options.watch(parts(range(options.iterations if fit.parameters else 0)), problem.name):
            loss = fit.step(step, order[step])
            curve[step * len(curve) // options.iterations] = loss * fit.first
            taken = step + 1
            if options.early_stop and fit.is_settled(step, curve):
                break
    if not fit.is_finite():
        last = float(curve[max(0, taken * len(curve) // options.iterations - 1)])
        raise DivergenceError(
            f"reconstruction diverged: after {taken} steps the loss is {last}, it was {before}; "
            "lower step_lr, bias_lr or the lr of the rounding"
        )
    undo = fit.write()
    after = mean_loss(problem, options)
    if not after <= before:
        undo()
        after = before
    points = curve[: max(1, taken * len(curve) // options.iterations)].tolist() if taken else []
    return Solution(before, after, points, taken)


def seconds_of_step(problem: Problem, options: RunOptions) -> float:
    """How long an iteration takes for a unit: a few are run, and nothing of them is kept."""
    fit = _Fit(problem, WeightGrid(problem.quantizers.weights), options, torch.Generator(problem.inputs.device))
    order = _order(problem.samples, _TRIED, max(1, options.batch_size // options.ranks), 0)
    loss, begin = torch.zeros(()), time.perf_counter()
    with fit.taps():
        for step in range(_TRIED if fit.parameters else 0):
            if step == 1:  # the first one is slower
                float(loss)
                begin = time.perf_counter()
            loss = fit.step(step, order[step])
        float(loss)  # a device is waited for
    seconds = (time.perf_counter() - begin) / (_TRIED - 1)
    fit.restore_biases()
    return seconds


class _Fit:
    """What is learned of a unit, and one step of it."""

    def __init__(self, problem: Problem, grid: WeightGrid, options: RunOptions, generator: torch.Generator) -> None:
        self.problem = problem
        self.grid = grid
        self.options = options
        self.generator = generator
        self.run: Callable[..., Tensor] = call
        if options.compile:
            torch.compiler.reset()  # else units count as recompilations of one function, of which there may be few
            self.run = torch.compile(call)
        self.inner = problem.inner if options.regularization else None
        self.objective = problem.objective_of(options)
        self.differ = self._differing_inputs()
        self.rounding = options.rounding_method.begin(grid)
        learned = problem.quantizers.learned if options.activation_mode == "learned" else []
        steps = [quantizer.log2_step.detach() for quantizer in learned]
        self.log2_steps = torch.stack(steps).requires_grad_() if steps else None
        self.learned = {id(quantizer): i for i, quantizer in enumerate(learned)}
        self.biases = problem.quantizers.biases if options.bias_lr else []
        self.masters = [bias.detach().float().clone() for bias in self.biases]  # small steps of half-precision biases
        self._old_biases = [bias.detach().clone() for bias in self.biases]
        groups = self._groups()
        self.moved = [parameter for group in groups for parameter in group["params"]]
        self.parameters = [*self.moved[: len(self.moved) - len(self.masters)], *self.biases]
        self.optimizer = torch.optim.Adam(groups, fused=True) if groups else None
        self._peaks = [group["lr"] for group in groups]
        self._weights: list[Tensor] = []
        self._steps: Sequence[Tensor] = ()
        self._drop = 0.0
        self.first = 1.0  # what the loss is divided by
        self._first_inside: Tensor | None = None
        self._outputs: tuple[list[Tensor], list[Tensor]] = ([], [])  # inside, of the quantized and of the float unit

    def _differing_inputs(self) -> list[bool]:
        """Which arguments are others than in the float network."""
        inputs, float_inputs = self.problem.inputs, self.problem.float_inputs
        if float_inputs is inputs:
            return [False] * len(inputs.leaves)
        first = (one.batch(slice(0, self.options.batch_size)) for one in (inputs, float_inputs))
        return [isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(*first, strict=True)]

    def _groups(self) -> list[dict[str, Any]]:
        """What the optimizer moves: the rounding, the steps of activations, the biases."""
        lr, step_lr = self.options.rates
        groups: list[dict[str, Any]] = []
        if self.rounding.parameters and self.grid.values.numel():  # no values if all weights are another unit's
            groups.append({"params": self.rounding.parameters, "lr": lr, "falls": self.options.rounding_method.falls})
        if self.log2_steps is not None:
            groups.append({"params": [self.log2_steps], "lr": step_lr, "falls": True})
        if self.biases:
            groups.append({"params": self.masters, "lr": self.options.bias_lr, "falls": True})
        return groups

    @contextmanager
    def taps(self) -> Iterator[None]:
        """Have the unit's quantizers give what is being learned."""
        with ExitStack() as stack:
            for i, (quantizer, _) in enumerate(self.problem.quantizers.weights):
                stack.enter_context(tapped(quantizer, self._weight(i)))
            for activation in self.problem.quantizers.activations:
                stack.enter_context(tapped(activation, self._activation(activation)))
            for pair in self.inner.pairs if self.inner else ():
                for module, outputs in zip(pair, self._outputs, strict=True):
                    handle = module.register_forward_hook(lambda _, __, output, to=outputs: to.append(output))
                    stack.callback(handle.remove)
            for bias in self.biases:
                stack.callback(_release, bias.requires_grad_(True))
            try:
                yield
            except BaseException:
                self.restore_biases()
                raise

    def step(self, step: int, index: Tensor) -> Tensor:
        """One step of the optimizer; returns the loss, without the penalty, on the device."""
        done = step / self.options.iterations
        self.objective.advance(step, self.options.iterations, self._passes)
        self._drop = self.options.drop_schedule(done)
        self.rounding.advance(done)
        leaves = self._arguments(index)
        with torch.enable_grad():
            loss = self._loss(leaves, index)
            penalty = self.rounding.penalty()
            total = loss if penalty is None else loss + penalty
            if self.optimizer is None or not total.requires_grad:
                return loss.detach()
            grads = torch.autograd.grad(total, self.parameters, allow_unused=True)
        for moved, grad in zip(self.moved, self._over_ranks(grads), strict=True):
            moved.grad = grad.to(moved.dtype)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            if group["falls"]:
                group["lr"] = peak * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.step()
        with torch.no_grad():
            for bias, master in zip(self.biases, self.masters, strict=True):
                bias.copy_(master)
        return loss.detach()

    def _arguments(self, index: Tensor) -> list[Any]:
        """The arguments of the unit for some samples, some of their elements float; runs the float unit if compared."""
        problem = self.problem
        leaves = problem.inputs.batch(index)
        if self._drop > 0 or self.inner is not None:
            float_leaves = problem.float_inputs.batch(index)
            pairs = zip(leaves, float_leaves, self.differ, strict=True)
            leaves = [self._mixed(q, x) if differ else q for q, x, differ in pairs]
            if self.inner is not None:
                for outputs in self._outputs:
                    outputs.clear()
                with torch.no_grad():
                    call(self.inner.float_modules, float_leaves, problem.inputs.spec)
        return leaves

    def _loss(self, leaves: list[Any], index: Tensor) -> Tensor:
        """The loss of some samples, without the penalty."""
        problem, options = self.problem, self.options
        self._weights = self.grid.tensors(self.rounding.levels())
        self._steps = () if self.log2_steps is None else self.log2_steps.unbind()
        with torch.compiler.set_stance("default" if options.compile else "force_eager"):
            output = self.run(problem.modules, leaves, problem.inputs.spec)
        loss = self.objective(output, problem.targets.batch(index), index) / self.first
        if self.inner is not None:
            inner = [(a, b) for a, b in zip(*self._outputs, strict=True) if a is not output]  # that has its loss
            if inner:
                loss = loss + options.regularization * self._over_first(self.inner.difference(inner))
        return loss

    def _over_first(self, difference: Tensor) -> Tensor:
        """The difference inside of the unit, over its first value if the loss is."""
        if not self.options.over_first:
            return difference
        if self._first_inside is None:
            self._first_inside = self.options.mean_over_ranks(difference.detach()).clone()
        return over(difference, self._first_inside)

    def _passes(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which samples, outputs of the unit as it is now, nothing dropped, and targets."""
        problem, self._drop = self.problem, 0.0
        with torch.no_grad():
            self._weights = self.grid.tensors(self.rounding.levels())
        self._steps = () if self.log2_steps is None else self.log2_steps.detach().unbind()
        for passed in problem.passes(self.options):
            for outputs in self._outputs:
                outputs.clear()
            yield passed

    def _over_ranks(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Gradients of `parameters`, the mean over all ranks, float32."""
        full = [torch.zeros_like(p) if g is None else g.float() for p, g in zip(self.parameters, grads, strict=True)]
        if self.options.reduce is None or self.options.ranks == 1:
            return full
        flat = self.options.mean_over_ranks(torch.cat([grad.reshape(-1) for grad in full]))
        parts = flat.split([grad.numel() for grad in full])
        return [part.view_as(grad) for part, grad in zip(parts, full, strict=True)]

    def is_settled(self, step: int, curve: Tensor) -> bool:
        """Whether to stop early; asked now and then, because the answer has to come from the device."""
        every = max(1, self.options.iterations // 20)
        if (step + 1) % every or step + 1 < 4 * every:
            return False
        point = (step + 1) * len(curve) // self.options.iterations
        width = max(1, every * len(curve) // self.options.iterations)
        losses = torch.stack([curve[point - width : point].mean(), curve[point - 2 * width : point - width].mean()])
        if self.options.reduce is not None and self.options.ranks > 1:  # the ranks have to agree
            losses = self.options.reduce(losses, "sum")
        falls = losses[0] < 0.99 * losses[1]
        with torch.no_grad():
            undecided = ((self.rounding.levels() - self.rounding.hard_levels()).abs() > 0.05).float().mean()
        return not bool(falls) and bool(undecided < 1e-3)

    def is_finite(self) -> bool:
        """Whether all that was learned are numbers; if not, biases are what they were."""
        if all(bool(parameter.detach().isfinite().all()) for parameter in self.parameters):
            return True
        self.restore_biases()
        return False

    @torch.no_grad()
    def restore_biases(self) -> None:
        """Biases are what they were."""
        for bias, old in zip(self.biases, self._old_biases, strict=True):
            bias.copy_(old)

    @torch.no_grad()
    def write(self) -> Callable[[], None]:
        """Put into the model what was learned; returns a function that takes it back."""
        weights = [weight.detach().clone() for weight in self.grid.weights]
        learned = [quantizer for quantizer in self.problem.quantizers.learned if id(quantizer) in self.learned]
        steps = [quantizer.log2_step.detach().clone() for quantizer in learned]
        self.grid.write(self.rounding.hard_levels())
        for quantizer in learned:
            quantizer.log2_step.copy_(self.log2_steps[self.learned[id(quantizer)]])  # type: ignore[index]
            quantizer.refresh()

        def undo() -> None:
            with torch.no_grad():
                for weight, old in zip([*self.grid.weights, *self.biases], weights + self._old_biases, strict=True):
                    weight.copy_(old)
                grid = WeightGrid(self.problem.quantizers.weights)
                grid.write(grid.nearest())
                for quantizer, old in zip(learned, steps, strict=True):
                    quantizer.log2_step.copy_(old)
                    quantizer.refresh()

        return undo

    def _weight(self, i: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: self._weights[i].to(weight.dtype)

    def _activation(self, quantizer: ActivationQuantizer) -> Callable[[Tensor], Tensor]:
        if self.options.activation_mode == "float":
            return lambda x: x
        own = quantizer.log2_step.detach()
        position = self.learned.get(id(quantizer))

        def quantize(x: Tensor) -> Tensor:
            step = own if position is None else self._steps[position]
            return quantizer.rounded_by(x, step, kept=random_mask(x, self._drop, self.generator))

        return quantize

    def _mixed(self, quantized: Any, float_input: Any) -> Any:
        """Elements of the float network's input in place of some of the quantized one's."""
        if not isinstance(quantized, Tensor) or not quantized.is_floating_point():
            return quantized
        mask = random_mask(quantized, self._drop, self.generator)
        return quantized if mask is None else torch.lerp(quantized, float_input, mask.to(quantized.dtype))


def _release(parameter: Tensor) -> None:
    parameter.requires_grad_(False).grad = None


def _order(samples: int, iterations: int, batch_size: int, seed: int) -> Tensor:
    """Samples of each step, (iterations, batch size): one permutation of all after the other."""
    generator = torch.Generator().manual_seed(seed)
    needed = iterations * batch_size
    epochs = [torch.randperm(samples, generator=generator) for _ in range(math.ceil(needed / max(samples, 1)))]
    flat = torch.cat(epochs) if epochs else torch.zeros(0, dtype=torch.int64)
    return flat[:needed].view(iterations, batch_size)
