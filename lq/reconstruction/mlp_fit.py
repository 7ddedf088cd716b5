"""One MLP between two linear layers, fitted to a ReLU in the place of its GELU; see `lq.reconstruction.mlp`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.attachment.relu import put_relu
from lq.attachment.sites import float_weight, weight_quantizer
from lq.errors import DivergenceError, SpecError
from lq.reconstruction.options import AT_LEAST_1, Watch
from lq.reconstruction.storage import Stored, memory_in_bytes

# Values that a quantile is found of at a time.
_VALUES = 1 << 20


@dataclass(frozen=True)
class MLP:
    """A linear layer, a GELU that alone reads it, and the linear layer that alone reads that; by their names."""

    first: str
    activation: str
    second: str


@dataclass(frozen=True)
class MLPReport:
    """What became of an MLP.

    Args:
        name: of its GELU.
        before: mean squared error of its output with a ReLU, over the variance of the output.
        after: the same with fitted layers.
        limit: u, what the second layer's input is clipped to in the second term.
    """

    name: str
    before: float
    after: float
    limit: float


@dataclass(frozen=True)
class MLPOptions:
    """How MLPs are reconstructed.

    Args:
        iterations: optimizer steps for an MLP.
        batch_size: samples in a step, over all ranks.
        lr: learning rate of weights and biases, for Adam; falls to 0 as a cosine; None: by the number of iterations,
            4e-5 for 20 000.
        quantile: of the positive values of the GELU, where the input of the second layer is clipped in the second term.
        clipped: weight of the second term; 0: it is left out.
        memory: limit for captured inputs on the device, and once more in host memory; the rest goes to files.
        seed: of the order of samples.
    """

    iterations: int = field(default=20_000, metadata=AT_LEAST_1)
    batch_size: int = field(default=32, metadata=AT_LEAST_1)
    lr: float | None = None
    quantile: float = 0.99
    clipped: float = 2.0
    memory: str | float = "4GB"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            raise SpecError(f"iterations={self.iterations} and batch_size={self.batch_size} must be at least 1")
        if (self.lr is not None and not self.lr > 0) or not 0 < self.quantile <= 1 or not self.clipped >= 0:
            raise SpecError(
                f"lr={self.lr} must be positive, quantile={self.quantile} a share above 0, clipped={self.clipped} not "
                "negative"
            )
        memory_in_bytes(self.memory)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 4e-5 * min(max(20_000 / self.iterations, 1.0), 10.0) if self.lr is None else self.lr


class MLPFit:
    """One MLP, and the weights that are fitted.

    Args:
        model: the model it is a part of, of which no quantizer rounds.
        mlp: which one.
        inputs: what its first layer reads, by batch.
        options: how.
        mean: of a tensor over ranks.
        ranks: number of ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        mlp: MLP,
        inputs: Sequence[Stored],
        options: MLPOptions,
        mean: Callable[[Tensor], Tensor],
        ranks: int,
    ) -> None:
        self.model, self.mlp, self.inputs, self.options, self.mean = model, mlp, inputs, options, mean
        self.share = max(1, options.batch_size // ranks)
        self.layers = [model.get_submodule(name) for name in (mlp.first, mlp.second)]
        self.activation: nn.Module = model.get_submodule(mlp.activation)
        tensors = [tensor for layer in self.layers for tensor in (float_weight(layer), layer._parameters.get("bias"))]
        self._device = next(model.parameters()).device
        self.originals = [None if tensor is None else tensor.detach().float() for tensor in tensors]
        self.fitted = [None if t is None else t.clone().requires_grad_() for t in self.originals]
        self.limit = math.inf

    def run(self, watch: Watch) -> MLPReport:
        """Fit, without writing; returns what came of it."""
        self.limit = self._quantile()
        before = self._error()
        learned = [tensor for tensor in self.fitted if tensor is not None]
        optimizer = torch.optim.Adam(learned, lr=self.options.rate)
        for step, rows in zip(watch(range(self.options.iterations), self.mlp.activation), self._order(), strict=False):
            done = step / self.options.iterations
            optimizer.param_groups[0]["lr"] = self.options.rate * (1 + math.cos(math.pi * done)) / 2
            with torch.enable_grad():
                grads = torch.autograd.grad(self._loss(self._rows(rows)), learned)
            flat = self.mean(torch.cat([grad.reshape(-1) for grad in grads]))
            for tensor, grad in zip(learned, flat.split([grad.numel() for grad in grads]), strict=True):
                tensor.grad = grad.view_as(tensor)
            optimizer.step()
        if not all(bool(tensor.isfinite().all()) for tensor in learned):
            raise DivergenceError(f"MLP reconstruction of {self.mlp.activation} diverged: lower lr={self.options.rate}")
        return MLPReport(self.mlp.activation, before, self._error(), self.limit)

    @torch.no_grad()
    def write(self) -> None:
        """Put the ReLU and the fitted weights into the model, and the ranges of those weights."""
        put_relu(self.model, self.mlp.activation)
        weight1, bias1, weight2, bias2 = self.fitted
        for layer, weight, bias in zip(self.layers, (weight1, weight2), (bias1, bias2), strict=True):
            own, quantizer = float_weight(layer), weight_quantizer(layer)
            if own is not None and weight is not None:
                own.copy_(weight)
            if bias is not None:
                layer._parameters["bias"].copy_(bias)  # type: ignore[union-attr]
            if quantizer is not None and own is not None:
                quantizer.calibrate(own)

    def _loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._before(x)
        inner = self._inner(x)
        loss = F.mse_loss(self._second(inner), target)
        if self.options.clipped:
            loss = loss + self.options.clipped * F.mse_loss(self._second(inner.clamp(max=self.limit)), target)
        return loss

    def _inner(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.fitted[0], self.fitted[1]))  # type: ignore[arg-type]

    def _second(self, inner: Tensor) -> Tensor:
        return F.linear(inner, self.fitted[2], self.fitted[3])  # type: ignore[arg-type]

    def _inner_before(self, x: Tensor) -> Tensor:
        inner: Tensor = self.activation(F.linear(x, self.originals[0], self.originals[1]))  # type: ignore[arg-type]
        return inner

    def _before(self, x: Tensor) -> Tensor:
        return F.linear(self._inner_before(x), self.originals[2], self.originals[3])  # type: ignore[arg-type]

    @torch.no_grad()
    def _quantile(self) -> float:
        """The mean over batches, and over ranks, of the quantile of a batch's positive values."""
        found = []
        for stored in self.inputs:
            values = self._inner_before(self._on_device(stored.whole())).reshape(-1)
            values = values[values > 0][:: max(1, values.numel() // _VALUES)]
            if values.numel():
                found.append(values.quantile(self.options.quantile))
        return float(self.mean(torch.stack(found).mean())) if found else math.inf

    @torch.no_grad()
    def _error(self) -> float:
        """The squared error of the output as it is now, over the variance of what it was; of all samples and ranks."""
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        for stored in self.inputs:
            x = self._on_device(stored.whole())
            y = self._before(x)
            error = self._second(self._inner(x)) - y
            parts = (error.double().square().sum(), y.double().square().sum(), y.double().sum())
            sums += torch.stack([*parts, parts[0].new_tensor(float(y.numel()))])
        error, squares, total, count = self.mean(sums).tolist()
        variance = squares / count - (total / count) ** 2
        return float(error / count / variance) if variance > 0 else 0.0

    def _order(self) -> Iterator[Tensor]:
        """Samples of each step: one permutation of all after the other."""
        total = sum(len(stored.data) for stored in self.inputs)
        generator = torch.Generator().manual_seed(self.options.seed)
        left = torch.zeros(0, dtype=torch.int64)
        while total:
            while len(left) < self.share:
                left = torch.cat([left, torch.randperm(total, generator=generator)])
            yield left[: self.share]
            left = left[self.share :]

    def _rows(self, numbers: Tensor) -> Tensor:
        """These samples of what the first layer reads."""
        parts, start = [], 0
        for stored in self.inputs:
            size = len(stored.data)
            inside = numbers[(numbers >= start) & (numbers < start + size)] - start
            if len(inside):
                parts.append(self._on_device(stored.rows(inside)))
            start += size
        return torch.cat(parts)

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self._device).float()
