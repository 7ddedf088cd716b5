"""Who trains what: quantizer parameters stay out of the user's optimizers, whatever is unfrozen, added or replaced."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn

from lq.attachment.sites import float_weight, layers, quantizers
from lq.callbacks import FineTune, LearnNoiseScale, Quantize
from lq.errors import StateError
from tests.callbacks.training import Stop, updates_of
from tests.helpers import QUIET, Tiny, assert_same, fit, quantizer_ids, run_on_ranks, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

RATE = 1e-3


class Backbone(pl.LightningModule):
    """A backbone and a head, each of two layers; the optimizer holds all parameters or those that are trained."""

    def __init__(self, everything=False, frozen=False):
        super().__init__()
        self.everything = everything
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.backbone.requires_grad_(not frozen)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        chosen = [p for p in self.parameters() if self.everything or p.requires_grad]
        return torch.optim.AdamW(chosen, 1e-2, weight_decay=0.5)


def backbone(**kwargs):
    torch.manual_seed(0)
    return Backbone(**kwargs)


def head_only():
    """A `Backbone` that is not frozen, but which the optimizer does not hold."""
    module = backbone()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.head.parameters(), 1e-2, weight_decay=0.5)
    return module


def quantize():
    return Quantize(4, 4, fold_bn=False)


class Ledger(pl.Callback):
    """The parts of grids after each epoch, and after each batch what the user's optimizer holds that is ours."""

    def __init__(self):
        self.epochs, self.foreign = [], 0

    def on_fit_start(self, trainer, pl_module):
        self.epochs.append(self.grids(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        ours = quantizer_ids(pl_module)
        for optimizer in trainer.optimizers:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            self.foreign += sum(id(p) in ours for p in [*held, *optimizer.state])

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(self.grids(pl_module))

    @staticmethod
    def grids(module):
        found = {name: q for name, q in module.named_modules() if any(q is known for known in quantizers(module))}
        parts = ("log2_step", "zero_point", "bits")
        return {f"{name}.{part}": getattr(q, part).detach().clone() for name, q in found.items() for part in parts}

    def moved(self, epoch):
        """Names of what has moved in an epoch."""
        before, after = self.epochs[epoch], self.epochs[epoch + 1]
        return {name for name, value in after.items() if not torch.equal(value, before[name])}


def steps_below(ledger, *prefixes):
    """Names of all steps, or of those below some modules."""
    return {n for n in ledger.epochs[0] if n.endswith("log2_step") and n.startswith(prefixes or ("",))}


# --- layers that are unfrozen later ---------------------------------------------------------------------------------


ORDERS = {
    "after": lambda tuner, unfreezing: [quantize(), tuner, unfreezing],
    "between": lambda tuner, unfreezing: [quantize(), unfreezing, tuner],
    "before": lambda tuner, unfreezing: [unfreezing, quantize(), tuner],
}


@pytest.mark.parametrize("everything", [False, True], ids=["filtered", "all parameters"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_steps_train_with_the_weights_of_their_layer(order, everything):
    module, ledger = backbone(everything=everything), Ledger()
    unfreezing = BackboneFinetuning(1, lambda epoch: 1.0)
    with updates_of(module) as updates:
        fit(module, [*ORDERS[order](FineTune("lsq", quantizer_lr=RATE), unfreezing), ledger], max_epochs=2)
    assert ledger.foreign == 0
    assert ledger.moved(0) == steps_below(ledger, "head")
    assert ledger.moved(1) == steps_below(ledger)
    (first,) = [u for u in updates if u.own][4:5]  # of four batches an epoch
    assert any("backbone" in name for name in first.gradients) and set(first.rates) == {RATE}


@pytest.mark.parametrize("everything", [False, True], ids=["filtered", "all parameters"])
def test_steps_of_frozen_weights_stay(everything):
    module, ledger = backbone(everything=everything, frozen=True), Ledger()
    fit(module, [quantize(), FineTune("lsq"), ledger], max_epochs=2)
    assert ledger.moved(0) | ledger.moved(1) == steps_below(ledger, "head")


def test_steps_alone_can_be_trained():
    module, ledger = backbone(everything=True, frozen=True), Ledger()
    module.head.requires_grad_(False)
    fit(module, [quantize(), FineTune("lsq"), ledger])
    assert ledger.moved(0) == steps_below(ledger)


def test_weights_that_are_unfrozen_by_name_bring_their_steps_along():
    class ByName(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                for _, layer in layers(pl_module.backbone):
                    float_weight(layer).requires_grad_(True)

    module, ledger = backbone(everything=True, frozen=True), Ledger()
    fit(module, [quantize(), FineTune("lsq"), ByName(), ledger], max_epochs=2)
    assert ledger.moved(0) == steps_below(ledger, "head")
    assert ledger.moved(1) == steps_below(ledger)


class Adding(pl.Callback):
    """Gives the backbone to the user's optimizer at a step, in one of many ways."""

    def __init__(self, how, step):
        self.how, self.step = how, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        (optimizer,) = trainer.optimizers
        new = list(pl_module.backbone.parameters())
        if self.how == "add_param_group":
            optimizer.add_param_group({"params": new, "lr": 1e-3})
        elif self.how == "layer-wise rates":
            for number, layer in enumerate(module for _, module in layers(pl_module.backbone)):
                optimizer.add_param_group({"params": list(layer.parameters()), "lr": 1e-3 * 0.5**number})
        elif self.how == "in a group that there is":
            optimizer.param_groups[0]["params"].extend(new)
        elif self.how == "another optimizer":
            trainer.strategy.optimizers = [torch.optim.AdamW(pl_module.parameters(), 1e-2, weight_decay=0.5)]
        else:
            raise ValueError(self.how)

    def on_before_backward(self, trainer, pl_module, loss):
        grids = [p for n, p in pl_module.backbone.named_parameters() if n.endswith("log2_step")]
        assert all(p.grad is None for p in grids), "a gradient of an earlier step"
        self.before = Ledger.grids(pl_module) if trainer.global_step == self.step else getattr(self, "before", {})

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            names = {n: p for n, p in pl_module.named_parameters() if n.startswith("backbone") and "log2_step" in n}
            self.gradients = {n: p.grad.clone() for n, p in names.items()}


WAYS = ["add_param_group", "layer-wise rates", "in a group that there is", "another optimizer"]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("tuner_first", [True, False])
def test_whoever_gets_the_weights_does_not_get_the_grids(how, step, tuner_first):
    """The first update of what is taken up is one of Adam: the rate, against the sign of the gradient; no decay."""
    module, adding, ledger = head_only(), Adding(how, step), Ledger()
    tuner = FineTune("lsq", quantizer_lr=RATE)
    made = fit(module, [quantize(), *([tuner, adding] if tuner_first else [adding, tuner]), ledger], max_steps=step + 1)
    assert ledger.foreign == 0 and made.global_step == step + 1
    after = Ledger.grids(module)
    assert len(adding.gradients) == 3
    for name, gradient in adding.gradients.items():
        moved = (after[name] - adding.before[name])[gradient.abs() > 1e-5]
        torch.testing.assert_close(moved, -RATE * gradient[gradient.abs() > 1e-5].sign(), rtol=0.02, atol=0)
    assert any((gradient.abs() > 1e-5).any() for gradient in adding.gradients.values())
    weights = {id(float_weight(layer)) for _, layer in layers(module)}
    assert weights <= {id(p) for o in made.optimizers for group in o.param_groups for p in group["params"]}


@pytest.mark.parametrize("how", ["add_param_group", "another optimizer"])
@pytest.mark.parametrize("estimator", ["ste", "ewgs", "lsq", "lsq_plus"])
def test_nothing_is_learned_but_what_the_estimator_says(how, estimator):
    class Everything(Adding):
        def on_train_epoch_start(self, trainer, pl_module):
            for p in pl_module.parameters():
                p.requires_grad = True

        def on_before_backward(self, trainer, pl_module, loss):
            pass

        def on_after_backward(self, trainer, pl_module):
            pass

    module, ledger, tuner = head_only(), Ledger(), FineTune(estimator)
    fit(module, [quantize(), tuner, Everything(how, 2), ledger], max_epochs=2)
    assert ledger.foreign == 0
    moved = {name.rpartition(".")[2] for name in ledger.moved(0) | ledger.moved(1)}
    assert moved == set(tuner._estimator.learns) - {
        "zero_point"
    }  # the inputs here are those of ReLUs or of signed data


@pytest.mark.parametrize("how", ["add_param_group", "another optimizer"])
def test_widths_come_down_whatever_is_unfrozen(how):
    class Quiet(Adding):
        def on_before_backward(self, trainer, pl_module, loss):
            pass

        def on_after_backward(self, trainer, pl_module):
            pass

    module, ledger = head_only(), Ledger()
    tuner = LearnNoiseScale(3, 3, until=0.5, first_last=None, distill=0)
    fit(module, [Quantize(8, 8, fold_bn=False), tuner, Quiet(how, 2), ledger], max_epochs=3)
    assert ledger.foreign == 0
    assert {b for q in quantizers(module) for b in q.bits.flatten().tolist()} <= {0.0, 1.0, 2.0, 3.0}


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_with_unfrozen_layers_equals_a_straight_one(order, tmp_path):
    class Unfreezing(BaseFinetuning):
        """As BackboneFinetuning, which leaves frozen in a resumed run what was unfrozen before."""

        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone)

        def on_train_start(self, trainer, pl_module):
            if trainer.current_epoch > 1:
                self.make_trainable(pl_module.backbone)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)

    def train(folder, seed, *extra, ckpt_path=None):
        torch.manual_seed(seed)
        module, saver = Backbone(), ModelCheckpoint(tmp_path / folder, save_last=True)
        callbacks = ORDERS[order](FineTune("lsq"), Unfreezing())
        fit(module, [*callbacks, *extra, saver], max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return dict(module.state_dict())

    straight, half = train("straight", 0), train("half", 0, Stop(2))
    assert_same(train("resumed", 3, ckpt_path=tmp_path / "half" / "last.ckpt"), straight)
    assert not all(torch.equal(half[name], value) for name, value in straight.items())


def test_resume_files_of_earlier_versions_are_refused(tmp_path):
    module, saver = tiny(), ModelCheckpoint(tmp_path, save_last=True)
    fit(module, [quantize(), FineTune(), saver], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["callbacks"]["FineTune"]["optimizers"] = [{"state": {}, "param_groups": []}]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(StateError, match="written by an earlier version of lq"):
        fit(tiny(), [quantize(), FineTune()], max_epochs=2, ckpt_path=tmp_path / "old.ckpt")


# --- several optimizers ---------------------------------------------------------------------------------------------


class Adversaries(Tiny):
    """Two networks with an optimizer each, which freeze each other by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
        self.other = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.other(self.net(x))

    def training_step(self, batch, batch_idx):
        parts = (self.net, self.other)
        for own, optimizer in zip(parts, self.optimizers(), strict=True):
            for part in parts:
                part.requires_grad_(part is own)  # left so at the end: the first is frozen when a batch begins
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net, self.other)]


@pytest.mark.parametrize("stage", [FineTune("lsq"), LearnNoiseScale(3, 3, until=0.5, distill=0)], ids=["lsq", "noise"])
def test_networks_that_freeze_each_other(stage):
    torch.manual_seed(0)
    module, ledger = Adversaries(), Ledger()
    with updates_of(module) as updates:
        fit(module, [Quantize(8, 8, fold_bn=False), stage, ledger])
    assert ledger.foreign == 0
    assert sum(update.own for update in updates) == sum(not update.own for update in updates) == 8
    assert steps_below(ledger) <= ledger.moved(0)


# --- ranks ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from tests.callbacks.test_ownership import Backbone
from lq.callbacks import FineTune, Quantize
from tests.helpers import fit

torch.set_num_threads(1)


class Probe(Backbone):
    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


torch.manual_seed(0)
made = fit(Probe(frozen=True), [Quantize(4, 4, fold_bn=False), FineTune("lsq")], devices=2, strategy="ddp")
assert made.global_step == 2
made.strategy.barrier()
torch.distributed.destroy_process_group()
"""


def test_ddp_does_not_wait_for_gradients_of_frozen_layers(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run_on_ranks(tmp_path / "script.py", 2, tmp_path)


# --- Quantize alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unfreeze", "by hand", "BackboneFinetuning", "clipping by parameter"])
def test_without_fine_tuning_nothing_of_a_grid_is_learned(how):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and how == "unfreeze":
                pl_module.unfreeze()
            if trainer.current_epoch == 1 and how == "by hand":
                for p in pl_module.parameters():
                    p.requires_grad = True

        def on_after_backward(self, trainer, pl_module):
            if how == "clipping by parameter":
                for p in pl_module.parameters():
                    p.requires_grad = True
                    nn.utils.clip_grad_norm_(p, 0.1)

    module, ledger = backbone(everything=True), Ledger()
    unfreezing = BackboneFinetuning(1, lambda epoch: 1.0) if how == "BackboneFinetuning" else Unfreeze()
    if how == "BackboneFinetuning":
        module.everything = False
    fit(module, [quantize(), unfreezing, ledger], max_epochs=3)
    assert ledger.moved(0) | ledger.moved(1) | ledger.moved(2) == set()
