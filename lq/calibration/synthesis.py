r"""Images from a network alone: its BatchNorms remember what they were trained on (ZeroQ's distilled data).

Noise is optimised until the inputs of all BatchNorms have the statistics that are stored in them:

    ``L(x) = sum_l mean_c [((m_lc(x) - mean_lc) / std_lc)^2 + (s_lc(x) / std_lc - 1)^2]``

with ``m``, ``s`` the mean and standard deviation of a channel over the batch and all positions, ``mean``, ``std`` the
stored ones, and ``l`` running over the BatchNorms and the input itself, whose mean is to be 0 and deviation 1.

Source: Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, section 3.1; Adam with learning rate
0.5, 500 iterations and small batches are those of its code. Deviations are compared, not variances, as there: they are
in the units of the mean. What deviates:

- Each channel is measured in standard deviations of its own, not in the units of its layer, where layers and channels
  with large values drown the others.
- The learning rate falls along a cosine. The code waits for plateaus of the loss, which takes a host sync an iteration.

What other methods add was tried on a ResNet-20 for CIFAR-10, reconstructed at 2-bit weights, and left out: shifting and
flipping the images in each iteration, the cross-entropy with random classes and the entropy of the outputs all made
worse calibration data, noise with the spectrum of natural images no better. 100 iterations did as well as 200 there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.sites import is_attached
from lq.bars import Iterations, parts, steps
from lq.calibration.batchnorm import batchnorms
from lq.errors import DataError, SpecError, StateError
from lq.structure.forward import eval_mode, run
from lq.structure.recomputation import without_recomputation

# Iterations that made images as good (see above), to say what they would take.
_FEWER = 100

#: A mean and a standard deviation, each of shape (C,).
Statistics = tuple[Tensor, Tensor]


def synthesize(
    model: nn.Module,
    shape: Sequence[int],
    samples: int = 1024,
    *,
    batch_size: int = 64,
    iterations: int = 500,
    lr: float = 0.5,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Make inputs on which the BatchNorms of `model` see what they saw in training.

    Args:
        model: a float model with BatchNorms that are not folded; runs in eval mode and is left as it was.
        shape: shape of one sample, such as ``(3, 224, 224)``.
        samples: how many to make.
        batch_size: samples that have the statistics together.
        iterations: steps of Adam on each batch.
        lr: learning rate of the first step, in standard deviations of the input; falls to zero along a cosine.
        seed: the samples depend on it, and not on the global random state.
        rank: which share to make: batch k is made where ``k % ranks == rank``.
        ranks: number of shares; together they are the same samples for any number.
        progress: wraps the numbers of the batches to make (`tqdm.tqdm`, say).

    Returns:
        Samples of the share, shape ``(N, *shape)``, on the device of the model.

    Raises:
        SpecError: for numbers that are too small.
        StateError: if there are no BatchNorms, or the model has quantizers.
        DataError: if the model does not take such samples, or they diverge.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> synthesize(model, (3, 8, 8), samples=6, iterations=2).shape
    torch.Size([6, 3, 8, 8])
    """
    check_sizes(samples=samples, batch_size=batch_size, iterations=iterations, ranks=ranks)
    require_statistics(model, "lq.synthesize")
    sizes = torch.arange(samples).tensor_split(math.ceil(samples / batch_size))  # of about the same size
    seeds = torch.randint(2**62, (len(sizes),), generator=torch.Generator().manual_seed(seed)).tolist()
    like = next(buffer for norm in batchnorms(model) for buffer in norm.buffers() if buffer.is_floating_point())
    made = [like.new_empty(0, *shape)]
    with (
        eval_mode(model),
        without_recomputation(model),
        _frozen(model),
        torch.enable_grad(),
        _observed(model) as seen,
    ):
        share, each = range(rank, len(sizes), ranks), Iterations(iterations, _FEWER)
        for k in progress(steps(share, "Synthesizing", iterations=each)):
            noise = torch.randn(len(sizes[k]), *shape, generator=torch.Generator().manual_seed(seeds[k])).to(like)
            made.append(_optimised(noise, lambda x: _distance(model, x, seen), iterations, lr))
    images = torch.cat(made)
    if not images.isfinite().all():
        raise DataError(f"synthesis diverged at lr={lr}: samples have NaN or Inf; use a smaller lr")
    return images


def check_sizes(**sizes: int) -> None:
    """Raise for numbers that are too small: of samples, of iterations, of samples in a batch.

    Raises:
        SpecError: naming the number.
    """
    for name, size in sizes.items():
        least = 2 if name == "batch_size" else 1  # one sample alone would have to have all the variety
        if size < least:
            raise SpecError(f"{name}={size}; synthesis needs at least {least}")


def require_statistics(model: nn.Module, caller: str) -> None:
    """Raise an error that names the fix if the model has no BatchNorm statistics to synthesize from.

    Raises:
        StateError: if there are no BatchNorms, or the model has quantizers.
    """
    if is_attached(model):
        raise StateError(
            f"{caller} works on the float model, {type(model).__name__} has quantizers; "
            "use it before lq.fold_batchnorm and lq.attach"
        )
    if not batchnorms(model):
        raise StateError(
            f"{caller} needs BatchNorms with running statistics, {type(model).__name__} has none; use it before "
            "lq.fold_batchnorm, or, if the network never had any (a vision transformer), calibrate on real data"
        )


def _optimised(images: Tensor, loss: Callable[[Tensor], Tensor], iterations: int, lr: float) -> Tensor:
    """`images` after steps of Adam on their loss; nothing waits for the device."""
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], lr)
    for iteration in parts(range(iterations)):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * iteration / iterations)) / 2
        (images.grad,) = torch.autograd.grad(loss(images), images)
        optimizer.step()
    return images.detach()


def _distance(model: nn.Module, images: Tensor, seen: list[tuple[Statistics, Statistics]]) -> Tensor:
    """The loss of a batch of images: of its own statistics, and of those in `seen` when the model has run."""
    seen.clear()
    run(model, images)
    if not seen:
        raise StateError(f"{type(model).__name__} ran without calling a BatchNorm: its forward has no use of them")
    mean, std = _statistics(images)
    pairs = [((mean, std), (torch.zeros_like(mean), torch.ones_like(std))), *seen]
    terms = [((m - mean) / std).square().mean() + (s / std - 1).square().mean() for (m, s), (mean, std) in pairs]
    return torch.stack(terms).sum()


def _statistics(x: Tensor, eps: float = 0.0) -> Statistics:
    """Mean and standard deviation of each channel of `x`, shape (N, C, ...)."""
    var, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
    return mean, (var + eps).sqrt()


@contextmanager
def _observed(model: nn.Module) -> Iterator[list[tuple[Statistics, Statistics]]]:
    """A list to which every call of a BatchNorm adds the statistics of its input and those it has stored."""
    seen: list[tuple[Statistics, Statistics]] = []

    def observe(norm: Any, args: tuple[Tensor, ...]) -> None:
        stored = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        seen.append((_statistics(args[0], norm.eps), stored))

    handles = [norm.register_forward_pre_hook(observe) for norm in batchnorms(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have no parameter of `model` ask for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
