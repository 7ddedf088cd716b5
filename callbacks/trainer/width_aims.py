"""What learned widths are brought to: targets of their own, or a budget that those of weights share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lq.allocation.budget import Costs, parse_budget
from lq.attachment.summary import WIDTH_BITS
from lq.errors import BudgetError
from lq.training.noise_scale import WidthLearner
from lq.training.width_goals import SizeBudget, Targets

#: Mean bits, a compression such as "8x", or bytes such as "1.5MB"; None: each width has a target of its own.
Budget = float | str | None


def joined(learners: Sequence[WidthLearner], name: str) -> Tensor:
    """One value of each step of each learner, one after the other."""
    return torch.cat([getattr(learner, name) for learner in learners])


def by_learner(values: Tensor, learners: Sequence[WidthLearner]) -> tuple[Tensor, ...]:
    """The inverse of `joined`."""
    parts: tuple[Tensor, ...] = values.split([len(learner.bits) for learner in learners])
    return parts


def sharing(module: nn.Module, budget: Budget) -> set[str]:
    """Names of the quantizers whose widths share the budget: those of weights that are stored in integers."""
    if budget is None:
        return set()
    return {t.name for t in Costs.of(module).tensors.values() if t.role == "weight" and t.numel}


def mean_widths(module: nn.Module, budget: Budget) -> dict[str, float]:
    """The mean width of a budget for all weights, unless their widths have been chosen already."""
    if budget is None:
        return {}
    limit, costs = parse_budget(budget), Costs.of(module)
    weights = [t for t in costs.tensors.values() if t.role == "weight" and t.numel]
    values = max(sum(t.numel for t in weights), 1)
    mean = math.ceil(limit.limit * 8 / values if limit.kind == "bytes" else limit.cost_limit)
    chosen = len({t.bits for t in weights}) > 1
    return {} if chosen else {t.name: float(min(max(mean, 1), 8)) for t in weights}


def values_of_steps(module: nn.Module, learners: Sequence[WidthLearner]) -> Tensor:
    """How many values of a tensor share each step; in the order of `joined`."""
    costs = Costs.of(module)
    counts = []
    for learner in learners:
        for quantizer, size in zip(learner.members, learner.sizes, strict=True):
            counts += [costs.tensors[quantizer.name].numel / size] * size
    return torch.tensor(counts, dtype=torch.float32, device=joined(learners, "bits").device)


def shares_of_steps(module: nn.Module, learners: Sequence[WidthLearner]) -> dict[str, Tensor]:
    """The share of each step in the mean widths that are logged: over values of weights, and over activations."""
    is_weight = joined(learners, "is_weight")
    values = {"weight_bits": values_of_steps(module, learners) * is_weight, "activation_bits": (~is_weight).float()}
    return {name: counted / counted.sum() for name, counted in values.items() if bool(counted.any())}


def aim_of(module: nn.Module, learners: Sequence[WidthLearner], budget: Budget, start: Tensor) -> Targets | SizeBudget:
    """What the widths of all learners are brought to.

    Args:
        module: the module that they belong to.
        learners: of the widths.
        budget: of all weights together.
        start: the widths that they come from.

    Raises:
        BudgetError: if no weight has a width, or the budget has no room for their codes.
    """
    is_weight = joined(learners, "is_weight")
    targets = Targets(joined(learners, "target"), is_weight, start)
    if budget is None:
        return targets
    limit, costs = parse_budget(budget), Costs.of(module)
    stored = values_of_steps(module, learners) * is_weight
    if not bool(stored.any()):
        raise BudgetError(f"budget={budget!r}, but no weight has a width; quantize weights, or give targets")
    if limit.kind != "bytes":
        return SizeBudget(stored / stored.sum(), limit.cost_limit, targets, start)
    channels = int((stored > 0).sum())
    layers = sum(costs.tensors[q.name].numel > 0 for learner in learners for q in learner.members)
    room = limit.limit - costs.overhead - layers - channels * WIDTH_BITS / 8  # whole bytes; each channel's width
    if room <= 0:
        raise BudgetError(
            f"budget={budget!r} cannot be met: {limit.limit - room:.0f} bytes are taken by what is not codes "
            "of weights; give more"
        )
    return SizeBudget(stored / 8, room, targets, start)


def widths_at_the_end(learners: Sequence[WidthLearner], aim: Targets | SizeBudget) -> dict[str, Tensor]:
    """Widths at the end of training by name of the quantizer; with a budget, the mean that it allows."""
    now, target = joined(learners, "bits"), joined(learners, "target")
    final = torch.where(target.isnan(), now, target)
    if isinstance(aim, SizeBudget):
        final = torch.where(aim.costs > 0, min(aim.limit / float(aim.costs.sum()), float(now.max())), final)
    return {
        quantizer.name: bits.view(quantizer.bits.shape)
        for learner, part in zip(learners, by_learner(final, learners), strict=True)
        for quantizer, bits in zip(learner.members, part.split(learner.sizes), strict=True)
    }
