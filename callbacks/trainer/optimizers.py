"""The optimizer that quantizer parameters have of their own, beside those of the user.

A user's optimizer must not move the grid of a quantizer: its decay and learning rate are meant for weights. The
parameters are taken out of it, whenever it gets hold of them, and stepped here when it steps. With several optimizers
(a GAN) a quantizer belongs to the one that holds the weights of its layer; its gradients are forgotten when those of
the weights are, so that nothing of another optimizer's loss is left over. Layers that are unfrozen while training goes
on bring their quantizers along.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lq.errors import SpecError, StateError

Make = Callable[[list[dict[str, Any]]], Optimizer]


class QuantizerOptimizer:
    """Steps parameters of quantizers along with the user's optimizers.

    Args:
        groups: the parameters that belong to each of the user's optimizers, by name, in their order.
        lr: learning rate where the user's schedule is at its peak.
        make: makes the optimizer of parameter groups.
        scales: factors on the learning rate, by name of a parameter; others have 1.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, nn.Parameter]],
        lr: float,
        make: Make,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.lr = lr
        self._make = make
        self._set_aside: dict[str, Any] = {}  # states of parameters that no group has now, by name
        self._build(groups, scales or {})

    def arrange(self, groups: Sequence[Mapping[str, nn.Parameter]], scales: Mapping[str, float] | None = None) -> None:
        """Have other parameters, or the same ones belong to others of the user's optimizers; their states stay."""
        states = self.state_dict()
        self._build(groups, scales or {})
        self.load_state_dict(states)

    def _build(self, groups: Sequence[Mapping[str, nn.Parameter]], scales: Mapping[str, float]) -> None:
        self.groups = [list(group.values()) for group in groups]
        self._names = {id(parameter): name for group in groups for name, parameter in group.items()}
        self.optimizers = [self._make(self._by_scale(group, scales)) if group else None for group in groups]

    def _by_scale(self, group: Mapping[str, nn.Parameter], scales: Mapping[str, float]) -> list[dict[str, Any]]:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name in sorted(group, key=lambda name: scales.get(name, 1.0) != 1.0):
            by_scale.setdefault(scales.get(name, 1.0), []).append(group[name])
        return [{"params": parameters, "scale": scale} for scale, parameters in by_scale.items()]

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

    def state_dict(self) -> dict[str, Any]:
        """What the optimizers know of each parameter, by its name."""
        states = dict(self._set_aside)
        for optimizer in filter(None, self.optimizers):
            states.update({self._names[id(p)]: dict(state) for p, state in optimizer.state.items()})
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; what belongs to a parameter that no group has waits until one has it.

        Raises:
            StateError: if it is a list, as earlier versions of lq wrote it.
        """
        if not isinstance(states, Mapping):
            raise StateError(
                "the checkpoint's optimizer of quantizers was written by an earlier version of lq, which did not name "
                "what it learned; load the weights alone and train anew, without ckpt_path="
            )
        self._set_aside = {name: state for name, state in states.items() if name not in self._names.values()}
        for optimizer in filter(None, self.optimizers):
            names = [self._names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            known = {number: states[name] for number, name in enumerate(names) if name in states}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": known})


class UserOptimizers:
    """The user's optimizers, which are kept free of the parameters of quantizers, and where their schedules stand.

    Args:
        ours: identities of the parameters of quantizers.
        peaks: learning rates at the peaks of the schedules, of a run that is resumed; empty: found by `find_peaks`.
    """

    def __init__(self, ours: set[int], peaks: Sequence[float] = ()) -> None:
        self.ours = ours
        self.peaks = list(peaks)
        self._known: list[Optimizer] = []
        self._held: list[int] = []
        self._hooks: list[Any] = []

    def look(self, optimizers: Sequence[Optimizer]) -> bool:
        """Take our parameters out of the optimizers there are now; return whether any was replaced or holds others."""
        if _held(optimizers) == self._held:
            return False
        for optimizer in optimizers:
            remove_parameters(optimizer, self.ours)
            if not any(known is optimizer for known in self._known):  # others may rebuild groups before it is restored
                with suppress(AttributeError):  # wrappers around optimizers may lack what hooks need
                    hook = optimizer.register_load_state_dict_pre_hook(lambda o, _: remove_parameters(o, self.ours))
                    self._hooks.append(hook)
        if self._known and self.peaks:
            known = {id(optimizer): peak for optimizer, peak in zip(self._known, self.peaks, strict=False)}
            self.peaks = [known.get(id(optimizer)) or peak_rate(optimizer) for optimizer in optimizers]
        self._known, self._held = list(optimizers), _held(optimizers)
        return True

    def find_peaks(self) -> None:
        """Note the rates to compare with, unless a resumed run has them."""
        self.peaks = self.peaks or [peak_rate(optimizer) for optimizer in self._known]

    def factor(self, index: int) -> float:
        """Where the schedule of an optimizer stands: its learning rate over that at the peak."""
        rate, peak = self._known[index].param_groups[0]["lr"], self.peaks[index]
        return float(rate) / peak if peak else 1.0

    def release(self) -> None:
        """Leave no hook behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _held(optimizers: Iterable[Optimizer]) -> list[int]:
    """Identities of optimizers and of what they hold: another list whenever one of them has changed."""
    identities = []
    for optimizer in optimizers:
        identities.append(id(optimizer))
        for group in optimizer.param_groups:
            identities.extend(map(id, group["params"]))
    return identities


def remove_parameters(optimizer: Optimizer, ids: set[int]) -> None:
    """Take parameters, and what is known of them, out of an optimizer.

    Raises:
        StateError: if the optimizer keeps a list of its own.
    """
    for group in optimizer.param_groups:
        others = [p for p in group["params"] if id(p) not in ids]
        if len(others) < len(group["params"]) and hasattr(optimizer, "_params"):
            raise StateError(
                f"{type(optimizer).__name__} keeps its own list of parameters, so that quantizer parameters cannot be "
                "taken out; give it only the weights, or use FineTune(estimator='ste')"
            )
        group["params"] = others
    for parameter in [p for p in optimizer.state if id(p) in ids]:  # some have a state before their first step
        del optimizer.state[parameter]


def peak_rate(optimizer: Optimizer) -> float:
    """The learning rate that a user's optimizer, not yet stepped, has where its schedule is at its peak."""
    rates = (group.get("max_lr", group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    return next((float(rate) for rate in rates if rate), 0.0)  # cyclic schedules start far below their peak


def loss_scale(trainer: pl.Trainer) -> float | Tensor:
    """The factor on gradients by mixed precision; a tensor where it lies on a GPU, which is not waited for."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0
    held = getattr(scaler, "_scale", None)
    return held.detach() if isinstance(held, Tensor) else float(scaler.get_scale())


def scales_before_step(trainer: pl.Trainer, optimizer: Optimizer) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """Factors by mixed precision on gradients in ``on_before_optimizer_step``; a device is not waited for.

    Returns:
        The factor on the gradients of what `optimizer` holds, and that on all others.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = None if scaler is None else scaler._get_scale_async()
    if scale is None:
        return 1.0, 1.0
    return (scale if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0), scale


def steps_of(trainer: pl.Trainer) -> float:
    """How often the Trainer will step; infinite where it does not know.

    To be asked when training has begun: the answer needs the data, and a resumed run must restore loaders first.
    """
    total = float(trainer.estimated_stepping_batches)
    return total if total > 0 else math.inf


def share_of_run(trainer: pl.Trainer, caller: str) -> float:
    """How much of the training is done, from 0 to 1; by batches that stepped, whatever the number of optimizers.

    Raises:
        SpecError: if the Trainer does not know how long it will train; `caller` is what needs it.
    """
    total = steps_of(trainer)
    if math.isinf(total):
        raise SpecError(f"{caller} needs the number of steps; set max_epochs or max_steps on the Trainer")
    return min(trainer.fit_loop.epoch_loop._batches_that_stepped / total, 1.0)


def adam(lr: float) -> Make:
    """Adam without weight decay."""
    return lambda groups: torch.optim.Adam(groups, lr=lr)
