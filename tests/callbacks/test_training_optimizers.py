"""Any optimizer and any scheduler of torch and timm trains a quantized module, and quantizer rates follow them."""

import pytest
import timm.optim
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from tests.callbacks.training import STAGES, Begin, over, updates_of
from tests.helpers import QUIET, Tiny, fit, quantizer_ids

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Dense(Tiny):
    """Matrices only, without biases: what Muon takes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def dense(configure):
    """A `Dense` whose optimizers, from its parameters, are those that `configure` returns."""
    torch.manual_seed(0)
    module = Dense()
    module.configure_optimizers = lambda: configure(module.parameters())
    return module


# --- optimizers -----------------------------------------------------------------------------------------------------

TORCH = {
    "SGD": {"lr": 0.05}, "Adam": {}, "AdamW": {}, "RAdam": {}, "NAdam": {}, "Adagrad": {}, "RMSprop": {},
    "Adadelta": {"lr": 1.0}, "Adamax": {}, "Rprop": {}, "ASGD": {}, "Adafactor": {}, "Muon": {},
}  # fmt: skip
TIMM = [
    "sgd", "momentum", "adam", "adamw", "nadamw", "radam", "adamp", "adabelief", "adan", "adopt", "adafactor",
    "adafactorbv", "lamb", "larc", "lars", "lion", "madgradw", "muon", "novograd", "rmsproptf", "sgdp", "sgdw",
    "laprop", "mars", "lookahead_adamw", "lookahead_lamb",
]  # fmt: skip


def check_training(module, stages):
    """A few epochs move weights and quantizers, each by optimizers of their own, and the state can be saved."""
    begin = Begin()
    with updates_of(module) as updates:
        made = fit(module, [*stages(), begin], max_epochs=2)
    assert sum(update.own for update in updates) == made.global_step == 8
    begin.check_all_moved(module)
    ours, (optimizer,) = quantizer_ids(module), made.optimizers
    assert not any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
    assert not any(id(p) in ours for p in optimizer.state)
    kept = sum(len(group["params"]) for group in optimizer.param_groups)
    saved = optimizer.state_dict()["state"]
    assert set(saved) <= set(range(kept))


@over(STAGES)
@pytest.mark.parametrize("name", TORCH)
def test_any_optimizer_of_torch(stages, name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    options = {"lr": 1e-3, **TORCH[name]}

    def make(parameters):
        chosen = [p for p in parameters if p.ndim == 2] if name == "Muon" else parameters
        return getattr(torch.optim, name)(chosen, **options)

    check_training(dense(make), stages)


@over(STAGES)
@pytest.mark.parametrize("name", TIMM)
def test_any_optimizer_of_timm(stages, name):
    if name.removeprefix("lookahead_") not in timm.optim.list_optimizers():
        pytest.skip(f"this timm has no {name}")

    def make(parameters):
        return timm.optim.create_optimizer_v2(list(parameters), opt=name, lr=1e-2, weight_decay=0.01)

    check_training(dense(make), stages)


@over(STAGES)
def test_optimizer_with_groups_of_its_own(stages):
    def make(parameters):
        matrices = list(parameters)
        return torch.optim.AdamW([{"params": matrices[:1], "lr": 1e-4}, {"params": matrices[1:]}], lr=1e-2)

    check_training(dense(make), stages)


# --- schedules ------------------------------------------------------------------------------------------------------


def warm_up(optimizer):
    rise = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [rise, lr_scheduler.CosineAnnealingLR(optimizer, 8)], [4])


STEPWISE = {"interval": "step"}
SCHEDULES = {
    "StepLR": (lambda o: lr_scheduler.StepLR(o, 1, gamma=0.1), {}),
    "MultiStepLR": (lambda o: lr_scheduler.MultiStepLR(o, [1, 2]), {}),
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 12), STEPWISE),
    "CosineAnnealingWarmRestarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), STEPWISE),
    "OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=12), STEPWISE),
    "CyclicLR": (lambda o: lr_scheduler.CyclicLR(o, 0.05, 0.1, step_size_up=3), STEPWISE),
    "ExponentialLR": (lambda o: lr_scheduler.ExponentialLR(o, 0.5), {}),
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)), STEPWISE),
    "PolynomialLR": (lambda o: lr_scheduler.PolynomialLR(o, 12), STEPWISE),
    "SequentialLR": (warm_up, STEPWISE),
    "ReduceLROnPlateau": (
        lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=0, factor=0.1, threshold=10.0),
        {"monitor": "train_loss"},
    ),
}


@over(STAGES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_follow_any_schedule(stages, name):
    schedule, options = SCHEDULES[name]

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), **options}}

    check_rates(dense(make), stages)


@over(STAGES)
def test_rates_follow_a_schedule_of_timm(stages):
    def make(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        cosine = CosineLRScheduler(optimizer, t_initial=12, warmup_t=3, warmup_lr_init=1e-4, t_in_epochs=False)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]

    module = dense(make)
    module.lr_scheduler_step = lambda scheduler, metric: scheduler.step_update(num_updates=module.global_step)
    check_rates(module, stages)


def check_rates(module, stages):
    """Every rate of the quantizers is the user's times a constant, which is its own rate over the user's peak."""
    with updates_of(module) as updates:
        fit(module, stages(), max_epochs=3)
    own = [update.rates for update in updates if update.own]
    users = [update.rates[0] for update in updates if not update.own]
    assert len(own) == len(users) == 12
    assert len({round(rate, 9) for rate in users}) >= 2, "the schedule did nothing"
    for rates in zip(*own, strict=True):
        ratios = [rate / user for rate, user in zip(rates, users, strict=True)]
        assert ratios == pytest.approx([1e-3 / 0.05] * 12)
