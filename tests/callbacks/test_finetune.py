"""FineTune: what is learned, by which optimizer, at which rate; resume."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lq
from lq.attachment.sites import float_weight, quantized_layers, quantizers
from lq.callbacks import FineTune, Quantize
from tests.callbacks.training import quantize
from tests.helpers import QUIET, assert_same, fit, loader, most_values_over_limit, quantizer_ids, steps, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Watch(pl.Callback):
    """Notes learning rates of the own optimizer, own updates and user's updates, step by step."""

    def __init__(self, tuner):
        self.tuner, self.rates, self.user_rates, self.updates, self.user_updates = tuner, [], [], 0, 0

    def on_fit_start(self, trainer, pl_module):
        self.own = self.tuner._own.optimizers[0] if self.tuner._own is not None else None
        self.count(self.own, "updates")
        self.count(trainer.optimizers[0], "user_updates")
        self.begin = steps(pl_module)

    def count(self, optimizer, name):
        if optimizer is not None:
            optimizer.register_step_post_hook(lambda *_: setattr(self, name, getattr(self, name) + 1))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.user_rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.own is not None:
            self.rates.append(self.own.param_groups[0]["lr"])


def tune(module, tuner, data=None, **kwargs):
    """Fit and return the Trainer and what a `Watch` saw."""
    watch = Watch(tuner)
    return fit(module, [quantize(), tuner, watch], data, **kwargs), watch


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "moves"), [("lsq", True), ("ste", False)])
def test_lsq_moves_steps_and_ste_does_not(estimator, moves):
    module = tiny()
    _, watch = tune(module, FineTune(estimator))
    for begin, end in zip(watch.begin, steps(module), strict=True):
        assert bool((begin != end).all()) is moves
    assert (watch.updates > 0) is moves
    weights = {name: float_weight(layer) for name, layer in quantized_layers(tiny_attached())}
    for name, layer in quantized_layers(module):
        assert not torch.equal(float_weight(layer), weights[name])


def tiny_attached():
    return lq.attach(tiny(), 4, None)


@pytest.mark.parametrize("estimator", ["lsq", "ste"])
def test_users_optimizer_never_holds_quantizer_parameters(estimator):
    module = tiny()
    made, _ = tune(module, FineTune(estimator))
    ours = quantizer_ids(module)
    given = [id(p) for group in made.optimizers[0].param_groups for p in group["params"]]
    assert bool(ours) == (estimator != "ste") and not ours & set(given)
    assert set(given) == {id(p) for p in module.parameters()} - ours
    assert not ours & {id(p) for p in made.optimizers[0].state}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_leaves_steps_alone(optimizer):
    module = tiny(optimizer=optimizer, lr=0.01, weight_decay=10.0)
    _, watch = tune(module, FineTune("ste"), loader(8))
    assert_same(steps(module), watch.begin)
    module = tiny(optimizer=optimizer, lr=0.01, weight_decay=10.0)
    _, watch = tune(module, FineTune("lsq", quantizer_lr=1e-3), loader(8))
    for begin, end in zip(watch.begin, steps(module), strict=True):
        assert (begin - end).abs().max() <= 1.01e-3  # one Adam update, no decay on top


@pytest.mark.parametrize("bits", [1, 2, 3, [0, 2, 4, 1]])
def test_weights_keep_to_their_levels(bits):
    module = tiny()
    width = bits if isinstance(bits, int) else lq.QuantSpec(tuple(bits), signed=True)
    overrides = {"net.3": {"weights": width}}
    fit(module, [Quantize(2, 4, fold_bn=False, first_last=None, overrides=overrides), FineTune()], max_epochs=2)
    assert 0 < most_values_over_limit(module) <= 1
    module.eval()
    assert 0 < most_values_over_limit(module) <= 1


def test_steps_stay_positive_at_an_absurd_rate():
    module = tiny()
    _, watch = tune(module, FineTune(quantizer_lr=50.0), max_epochs=2)
    assert any((b - e).abs().max() > 20 for b, e in zip(watch.begin, steps(module), strict=True))
    for quantizer in quantizers(module):
        assert (quantizer.step > 0).all() and quantizer.step.isfinite().all()


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, "step", "onecycle"])
def test_own_rate_follows_the_users_schedule(scheduler):
    module = tiny(scheduler=scheduler, lr=0.02)
    _, watch = tune(module, FineTune(quantizer_lr=1e-3), max_epochs=3)
    assert len(watch.rates) == 12
    assert watch.rates == pytest.approx([rate / 0.02 * 1e-3 for rate in watch.user_rates])
    if scheduler == "step":
        assert watch.rates[::4] == pytest.approx([1e-3, 1e-4, 1e-5])
    if scheduler == "onecycle":
        assert max(watch.rates) == pytest.approx(1e-3, rel=0.05) and watch.rates[0] == pytest.approx(1e-3 / 25)


@pytest.mark.parametrize("scheduler", [None, "step", "onecycle"])
def test_lr_and_schedule_replace_optimizer_and_schedulers(scheduler):
    module = tiny(optimizer="adamw", scheduler=scheduler)
    made, watch = tune(module, FineTune(lr=0.005, schedule="cosine"), max_epochs=2)
    (optimizer,) = made.optimizers
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-5)
    expected = [0.005 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert watch.user_rates == pytest.approx(expected)
    assert watch.rates == pytest.approx([e / 0.005 * 1e-3 for e in expected])
    assert group["lr"] == pytest.approx(0, abs=1e-12)
    assert not quantizer_ids(module) & {id(p) for p in group["params"]}


def test_momentum_and_decay_are_arguments():
    made, _ = tune(tiny(), FineTune(lr=0.005, momentum=0.5, weight_decay=0.1))
    (group,) = made.optimizers[0].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.005, 0.5, 0.1)
    assert made.lr_scheduler_configs == []


@pytest.mark.parametrize("scheduler", [None, "onecycle"])
def test_schedule_alone_keeps_the_users_optimizer(scheduler):
    made, watch = tune(tiny(optimizer="adamw", lr=0.01, scheduler=scheduler), FineTune(schedule="cosine"))
    assert type(made.optimizers[0]) is torch.optim.AdamW
    assert watch.user_rates == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_cosine_without_an_end_is_an_error():
    with pytest.raises(lq.SpecError, match="set max_epochs or max_steps on the Trainer"):
        tune(tiny(), FineTune(schedule="cosine"), max_epochs=-1)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 8), (2, 4), (3, 4)])
def test_one_update_per_step_of_the_users_optimizer(accumulate, updates):
    module = tiny()
    made, watch = tune(module, FineTune(), max_epochs=2, accumulate_grad_batches=accumulate)
    assert (watch.updates, watch.user_updates, made.global_step) == (updates, updates, updates)


def test_accumulated_batches_equal_one_large_batch():
    ends = []
    for data, accumulate in [(loader(16, batch=16), 1), (loader(16, batch=8), 2)]:
        module = tiny(norm=False)
        fit(module, [Quantize(4, None), FineTune()], data, accumulate_grad_batches=accumulate)
        ends.append(steps(module))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_without_quantize():
    with pytest.raises(lq.StateError, match="put the Quantize callback before this one"):
        fit(tiny(), [FineTune()])


def test_before_quantize():
    with pytest.raises(lq.StateError, match="put the Quantize callback before this one"):
        fit(tiny(), [FineTune(), Quantize()])


def test_lbfgs():
    class Early(pl.Callback):
        """Before the callbacks of lq."""

        def on_fit_start(self, trainer, pl_module):
            trainer.strategy.optimizers = [torch.optim.LBFGS(pl_module.parameters())]

    with pytest.raises(lq.StateError, match="LBFGS keeps its own list of parameters"):
        fit(tiny(), [quantize(), Early(), FineTune()])
    module = tiny(optimizer="lbfgs")  # built in configure_optimizers, it has the weights alone
    fit(module, [quantize(), FineTune()])
    assert all(torch.equal(q.bits, q.bits.round()) for q in quantizers(module))


@pytest.mark.parametrize("kwargs", [{"lr": 0.1}, {"schedule": "cosine"}])
def test_replacing_the_optimizer_of_manual_optimization(kwargs):
    module = tiny()
    module.automatic_optimization = False
    with pytest.raises(lq.StateError, match="leave them out and set both in configure_optimizers"):
        fit(module, [quantize(), FineTune(**kwargs)])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"estimator": "pact"}, "estimator='pact' is unknown; use one of"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; use one of"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"quantizer_lr": -1}, "quantizer_lr=-1 must be positive"),
        ({"temperature": 0}, "temperature=0 must be positive"),
    ],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(lq.SpecError, match=text):
        FineTune(**kwargs)


# --- resume -----------------------------------------------------------------------------------------------------------

RESUMES = {
    "lsq": ({}, {}),
    "ste": ({}, {"estimator": "ste"}),
    "adamw": ({"optimizer": "adamw", "lr": 0.01}, {}),
    "schedule": ({"scheduler": "step"}, {}),
    "onecycle": ({"scheduler": "onecycle"}, {}),
    "replaced": ({"optimizer": "adamw"}, {"lr": 0.01, "schedule": "cosine"}),
    "teacher": ({}, {"distill": 1.0, "temperature": 2.0}),
    "batchnorm": ({}, {"freeze_bn_epoch": 3, "reestimate_bn": 16}),
}


class StopAfter(pl.Callback):
    """Ends training after some epochs of a longer run."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.filterwarnings("ignore:.*BatchNorms of Tiny were folded")
@pytest.mark.parametrize(("case", "fold"), [*((case, False) for case in RESUMES), ("lsq", True), ("teacher", True)])
def test_resumed_run_equals_a_straight_one(tmp_path, case, fold):
    ours, theirs = RESUMES[case][1], RESUMES[case][0]
    paths = {}

    def run(folder, seed, *, stop=None, ckpt_path=None):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        extra = [StopAfter(stop)] if stop else []
        module = tiny(seed, **theirs)
        chain = [Quantize(4, 4, fold_bn=fold), FineTune(**ours), *extra, saver]
        fit(module, chain, max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        paths[folder] = tmp_path / folder / "last.ckpt"

    run("straight", 0)
    run("half", 0, stop=2)
    run("resumed", 3, ckpt_path=paths["half"])  # other initial weights: all must come from the checkpoint
    straight, half, resumed = (torch.load(path, weights_only=True) for path in paths.values())
    assert (half["epoch"], straight["epoch"], resumed["epoch"]) == (1, 3, 3)
    assert_same(resumed["state_dict"], straight["state_dict"])
    assert_same(resumed["optimizer_states"], straight["optimizer_states"])
    assert_same(resumed["lr_schedulers"], straight["lr_schedulers"])
    own = [key for key in straight["callbacks"] if key.startswith("FineTune")]
    assert_same([resumed["callbacks"].get(k) for k in own], [straight["callbacks"].get(k) for k in own])
    assert bool(own) is (case != "ste")
    moved = half["state_dict"], straight["state_dict"]
    assert any(not torch.equal(moved[0][k], moved[1][k]) for k in moved[0])


def test_two_epochs_then_a_trainer_with_four(tmp_path):
    ends = []
    for epochs in ([4], [2, 4]):
        path = None
        for index, count in enumerate(epochs):
            saver = ModelCheckpoint(tmp_path / f"{len(epochs)}{index}", save_last=True)
            module = tiny(index)
            chain = [quantize(), FineTune(), saver]
            fit(module, chain, max_epochs=count, enable_checkpointing=True, ckpt_path=path)
            path = tmp_path / f"{len(epochs)}{index}" / "last.ckpt"
        ends.append(dict(module.state_dict()))
    assert_same(ends[0], ends[1])
