"""Which of the user's optimizers a quantizer belongs to: the one that holds the weights beside it.

What is learned of a quantizer is trained, frozen and forgotten along with those weights.
"""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from lq.quantizer.quantizer import Quantizer


def owned(module: nn.Module, optimizers: Sequence[Optimizer], default: int | None = None) -> list[dict[str, Quantizer]]:
    """The quantizers of `module`, by name, for each optimizer: it holds the weights of their layers.

    Args:
        module: a module with quantizers.
        optimizers: the user's.
        default: number of the optimizer that the quantizers of weights which no optimizer trains go with; None: they
            are left out.
    """
    holder = {id(p): i for i, optimizer in enumerate(optimizers) for g in optimizer.param_groups for p in g["params"]}
    by_optimizer: list[dict[str, Quantizer]] = [{} for _ in range(max(len(optimizers), 1))]
    for name, quantizer, weights in weights_around(module):
        index = next((holder[id(p)] for p in weights if id(p) in holder), default)
        if index is not None:
            by_optimizer[index][name] = quantizer
    return by_optimizer


def weights_around(module: nn.Module) -> list[tuple[str, Quantizer, list[nn.Parameter]]]:
    """Each quantizer of `module` with its name, and the parameters of the nearest module around it that has others."""
    modules = dict(module.named_modules())
    ours = quantizer_parameters(module)
    surrounded = []
    for name, quantizer in modules.items():
        if not isinstance(quantizer, Quantizer):
            continue
        above, weights = name, list[nn.Parameter]()
        while above and not weights:
            above = above.rpartition(".")[0]
            weights = [p for p in modules[above].parameters() if id(p) not in ours]
        surrounded.append((name, quantizer, weights))
    return surrounded


def quantizer_parameters(module: nn.Module) -> set[int]:
    """Identities of all parameters of quantizers, whether they are learned or not."""
    return {id(p) for part in module.modules() if isinstance(part, Quantizer) for p in part.parameters()}


def learned(quantizer: Quantizer) -> dict[str, nn.Parameter]:
    """What the estimator of a quantizer learns of it, by name."""
    learns = quantizer.estimator.learns
    return {name: part for name, part in quantizer.named_parameters(recurse=False) if name in learns}


def learned_by_optimizer(
    module: nn.Module, optimizers: Sequence[Optimizer], default: int | None = None
) -> tuple[list[dict[str, nn.Parameter]], dict[str, float]]:
    """What is learned of the quantizers for each optimizer, and factors on its learning rate; by name."""
    groups, scales = [], {}
    for members in owned(module, optimizers, default):
        groups.append({f"{name}.{part}": p for name, q in members.items() for part, p in learned(q).items()})
        # One learning rate is one share of the range: a zero point is in steps, of which many bits have many.
        scales.update({f"{name}.zero_point": 2.0 ** float(q.bits.detach().max()) for name, q in members.items()})
    return groups, scales


def freeze_with_weights(module: nn.Module) -> list[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Freeze what is learned of quantizers where all weights beside them are frozen, and say what was frozen.

    A module of which nothing is trained but its quantizers is left as it is.

    Returns:
        The weights, and what is learned of the quantizers beside them.
    """
    ours = quantizer_parameters(module)
    if not any(p.requires_grad for p in module.parameters() if id(p) not in ours):
        return []
    frozen = []
    for _, quantizer, weights in weights_around(module):
        parts = [part for part in learned(quantizer).values() if part.requires_grad]
        if parts and not any(p.requires_grad for p in weights):
            for part in parts:
                part.requires_grad_(False)
            frozen.append((weights, parts))
    return frozen


def unfreeze_with_weights(frozen: list[tuple[list[nn.Parameter], list[nn.Parameter]]]) -> None:
    """Unfreeze what `freeze_with_weights` froze where any of the weights is trained by now."""
    for pair in list(frozen):
        if any(p.requires_grad for p in pair[0]):
            for part in pair[1]:
                part.requires_grad_(True)
            frozen.remove(pair)


def forget_stale_gradients(optimizers: Sequence[Optimizer], groups: Sequence[Iterable[nn.Parameter]]) -> None:
    """Before a backward: drop the gradients of quantizers where those of the weights beside them were dropped."""
    for optimizer, group in zip(optimizers, groups, strict=False):
        weights = [p for g in optimizer.param_groups for p in g["params"]]
        if weights and all(p.grad is None for p in weights):
            for parameter in group:
                parameter.grad = None
