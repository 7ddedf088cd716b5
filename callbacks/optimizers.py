"""The optimizer that quantizer parameters have of their own, beside those of the user.

A user's optimizer must not move the grid of a quantizer: its decay and learning rate are meant for weights. The
parameters are taken out of it before it has any state, and stepped here when it steps. With several optimizers (a GAN)
a quantizer belongs to the one that holds the weights of its layer; its gradients are forgotten when those of the
weights are, so that nothing of another optimizer's loss is left over.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lq.errors import StateError
from lq.quantizer import Quantizer

Make = Callable[[list[dict[str, Any]]], Optimizer]


class QuantizerOptimizer:
    """Steps parameters of quantizers along with the user's optimizers.

    Args:
        groups: the parameters that belong to each of the user's optimizers, in their order.
        lr: learning rate where the user's schedule is at its peak.
        make: makes the optimizer of parameter groups.
        scales: factors on the learning rate, by identity of a parameter; others have 1.
    """

    def __init__(
        self, groups: Sequence[list[nn.Parameter]], lr: float, make: Make, scales: Mapping[int, float] | None = None
    ) -> None:
        self.groups = [list(group) for group in groups]
        self.lr = lr
        self.optimizers = [make(self._by_scale(group, scales or {})) if group else None for group in self.groups]

    def _by_scale(self, group: list[nn.Parameter], scales: Mapping[int, float]) -> list[dict[str, Any]]:
        found: dict[float, list[nn.Parameter]] = {}
        for parameter in sorted(group, key=lambda p: scales.get(id(p), 1.0) != 1.0):
            found.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
        return [{"params": parameters, "scale": scale} for scale, parameters in found.items()]

    def step(self, index: int, factor: float, scaler: Any = None) -> None:
        """Step the group of one of the user's optimizers, at `factor` times the learning rate.

        Without a gradient scaler, whose job that is, gradients that are not finite count as zero: no parameter becomes
        NaN, and no number has to be waited for.
        """
        optimizer = self.optimizers[index]
        if optimizer is None or all(p.grad is None for p in self.groups[index]):
            return
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor * group["scale"]
        if scaler is not None:
            scaler.step(optimizer)  # unscales, and skips the step if a gradient overflowed
        else:
            for parameter in self.groups[index]:
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
        optimizer.zero_grad()

    def state_dict(self) -> list[Any]:
        """The states of the optimizers."""
        return [None if optimizer is None else optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: Sequence[Any]) -> None:
        """Restore what `state_dict` gave."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            if optimizer is not None and state is not None:
                optimizer.load_state_dict(state)


def owned(module: nn.Module, optimizers: Sequence[Optimizer], default: int | None = None) -> list[list[Quantizer]]:
    """The quantizers of `module` by the optimizer that holds the weights of their layer.

    Args:
        module: a module with quantizers.
        optimizers: the user's.
        default: number of the optimizer that the quantizers of weights which no optimizer trains go with; None: they
            are left out.
    """
    holder = {id(p): i for i, optimizer in enumerate(optimizers) for g in optimizer.param_groups for p in g["params"]}
    found: list[list[Quantizer]] = [[] for _ in range(max(len(optimizers), 1))]
    modules = dict(module.named_modules())
    ours = {id(p) for part in modules.values() if isinstance(part, Quantizer) for p in part.parameters()}
    for name, quantizer in modules.items():
        if not isinstance(quantizer, Quantizer):
            continue
        above, weights = name, list[int]()  # those of the nearest module around it that has any
        while above and not weights:
            above = above.rpartition(".")[0]
            weights = [id(p) for p in modules[above].parameters() if id(p) not in ours]
        index = next((holder[p] for p in weights if p in holder), None)
        index = default if index is None else index
        if index is not None:
            found[index].append(quantizer)
    return found


def forget_stale_gradients(optimizers: Sequence[Optimizer], groups: Sequence[Iterable[nn.Parameter]]) -> None:
    """Before a backward: drop the gradients of quantizers where those of the weights beside them were dropped."""
    for optimizer, group in zip(optimizers, groups, strict=False):
        weights = [p for g in optimizer.param_groups for p in g["params"]]
        if weights and all(p.grad is None for p in weights):
            for parameter in group:
                parameter.grad = None


def remove_parameters(optimizer: Optimizer, ids: set[int]) -> None:
    """Take parameters out of an optimizer that has not stepped yet.

    Raises:
        StateError: if the optimizer keeps a list of its own.
    """
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in ids]
        if len(kept) < len(group["params"]) and hasattr(optimizer, "_params"):
            raise StateError(
                f"{type(optimizer).__name__} keeps its own list of parameters, so that quantizer parameters cannot be "
                "taken out; give it only the weights, or use FineTune(estimator='ste')"
            )
        group["params"] = kept
    for parameter in [p for p in optimizer.state if id(p) in ids]:  # some have a state before their first step
        del optimizer.state[parameter]


def peak_rate(optimizer: Optimizer) -> float:
    """The learning rate that a user's optimizer, not yet stepped, has where its schedule is at its peak."""
    rates = (group.get("max_lr", group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    return next((float(rate) for rate in rates if rate), 0.0)  # cyclic schedules start far below their peak


def schedule_factor(optimizer: Optimizer, peak: float) -> float:
    """Where the schedule of a user's optimizer stands: its learning rate over that at the peak."""
    return float(optimizer.param_groups[0]["lr"]) / peak if peak else 1.0


def loss_scale(trainer: pl.Trainer) -> float:
    """The factor on gradients by mixed precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def steps_of(trainer: pl.Trainer) -> float:
    """How often the Trainer will step; infinite where it does not know.

    To be asked when training has begun: the answer needs the data, and a resumed run must restore loaders first.
    """
    total = float(trainer.estimated_stepping_batches)
    return total if total > 0 else math.inf


def adam(lr: float) -> Make:
    """Adam without weight decay."""
    return lambda groups: torch.optim.Adam(groups, lr=lr)
