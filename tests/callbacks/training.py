"""Chains of callbacks that train a quantized module, and what optimizers do meanwhile, for the training contract."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lq.attachment.sites import quantizers
from lq.callbacks import AllocateBits, FineTune, FreezeOscillations, LearnNoiseScale, Quantize
from tests.helpers import assert_same, fit, quantizer_ids

Chain = Callable[[], list[pl.Callback]]

#: One line for each way to train, with ``quantizer_lr=1e-3``; a fresh chain at every call.
STAGES: dict[str, Chain] = {
    "lsq": lambda: [Quantize(4, 4, fold_bn=False), FineTune("lsq")],
    "noise_scale": lambda: [
        Quantize(8, 8, fold_bn=False),
        LearnNoiseScale(3, 3, until=0.5, quantizer_lr=1e-3, distill=0),
    ],
}

#: Those that follow gradients alone: no noise, no schedule of widths, so that they can be computed by hand.
PLAIN: dict[str, Chain] = {"lsq": STAGES["lsq"]}

#: The same with a teacher, and with everything that runs before and after training.
DISTILLED: dict[str, Chain] = {
    "distilled": lambda: [Quantize(4, 4, fold_bn=False), FineTune("lsq", distill=2.0)],
}
#: Those that hold weights by counts of what has happened: ranks must agree on it to the bit.
HELD: dict[str, Chain] = {
    "frozen": lambda: [
        quantize(first_last=None),
        FineTune("lsq", dampening=0.1),
        FreezeOscillations(0.04, 0.01, momentum=0.05),  # one oscillation is enough
    ],
}
FULL: dict[str, Chain] = {
    "full": lambda: [
        Quantize(4, 4, fold_bn=False, calibration_samples=16),
        AllocateBits("8x", samples=16),
        FineTune("lsq", distill=1.0, reestimate_bn=16),
    ],
}


def quantize(**options: Any) -> Quantize:
    """Four bits, BatchNorms as they are."""
    return Quantize(4, 4, fold_bn=False, **options)


def over(chains: dict[str, Chain]) -> Any:
    """Run a test for each chain."""
    return pytest.mark.parametrize("stages", list(chains.values()), ids=list(chains))


@dataclass(frozen=True)
class Update:
    """One step of an optimizer: its rates, and the gradients it used by name of the parameter.

    ``own``: it holds no weights, so that it is not the user's.
    """

    own: bool
    rates: tuple[float, ...]
    gradients: dict[str, Tensor]


@contextmanager
def updates_of(module: nn.Module) -> Iterator[list[Update]]:
    """All steps that optimizers take with a gradient, of whatever kind and whoever owns them, in their order."""
    found: list[Update] = []

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        names, ours = {id(p): name for name, p in module.named_parameters()}, quantizer_ids(module)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        own = not any(id(p) in names and id(p) not in ours for p in held)
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        gradients = {
            names.get(id(p), f"outside {i}"): p.grad.detach().clone() for i, p in enumerate(held) if p.grad is not None
        }
        if gradients:
            found.append(Update(own, rates, gradients))

    handle = register_optimizer_step_post_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def learned(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters of quantizers that are trained."""
    ours = quantizer_ids(module)
    return {n: p.detach().clone() for n, p in module.named_parameters() if id(p) in ours and p.requires_grad}


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all other parameters that are trained."""
    ours = quantizer_ids(module)
    return {n: p.detach().clone() for n, p in module.named_parameters() if id(p) not in ours and p.requires_grad}


class Begin(pl.Callback):
    """Copies of weight matrices and quantizer steps, by name, when training starts; what has moved since."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the state."""
        self.weights = {name: value for name, value in weights(pl_module).items() if value.ndim > 1}
        self.steps = {q.name: q.log2_step.detach().clone() for q in quantizers(pl_module)}

    def check_all_moved(self, module: nn.Module) -> None:
        """All of them are other numbers now, and numbers."""
        assert self.weights and self.steps
        now = {**weights(module), **{q.name: q.log2_step.detach() for q in quantizers(module)}}
        for name, value in {**self.weights, **self.steps}.items():
            assert now[name].isfinite().all() and not now[name].equal(value), f"{name} did not move"


class Stop(pl.Callback):
    """Ends training after some epochs of a longer run."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def check_resume(make: Callable[[int], pl.LightningModule], chain: Chain, root: Path) -> None:
    """A run of four epochs ends, to the bit, as one does that was stopped after two and resumed with other weights."""

    def train(folder: str, seed: int, *extra: pl.Callback, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        module, saver = make(seed), ModelCheckpoint(root / folder, save_last=True)
        callbacks = [*chain(), *extra, saver]
        fit(module, callbacks, max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return dict(module.state_dict())

    straight, half = train("straight", 0), train("half", 0, Stop(2))
    assert_same(train("resumed", 3, ckpt_path=root / "half" / "last.ckpt"), straight)
    assert not all(torch.equal(half[name], value) for name, value in straight.items())
