"""Quantized fine-tuning among the Trainer's other parts: search, compilation, resume, strategies."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import FineTune, Quantize, load_from_checkpoint
from tests.callbacks.training import DISTILLED, FULL, PLAIN, STAGES, Begin, check_resume, over, updates_of
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


# --- search for a learning rate or a batch size ---------------------------------------------------------------------


class Searched(Tiny):
    """Has what the searches look for: a learning rate, a batch size, a loader of its own."""

    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 0.05, 8

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self):
        return loader(32, batch=self.batch_size)

    def val_dataloader(self):
        return loader(24, batch=self.batch_size)


def searched():
    torch.manual_seed(0)
    return Searched()


class Ranges(pl.Callback):
    """All state when training starts, which searches leave as they found it."""

    def on_train_start(self, trainer, pl_module):
        if not hasattr(self, "state"):
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def finders():
    return {
        "rate": LearningRateFinder(num_training_steps=7, update_attr=False),
        "batch": BatchSizeFinder(init_val=8, max_trials=1, steps_per_trial=2),
    }


def run(stages, before=(), after=(), module=None, root=None, **kwargs):
    """Train a `Searched` and return it with the state that training started from and the gradients of all updates."""
    module, ranges = module or searched(), Ranges()
    with updates_of(module) as updates:
        made = trainer([*before, *stages(), *after, ranges], root=root, max_epochs=2, **kwargs)
        made.fit(module)
    count = made.global_step
    own, users = ([u.gradients for u in updates if u.own is own][-count:] for own in (True, False))
    return module, ranges.state, own, users


@over({**STAGES, **DISTILLED, **FULL})
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", ["rate", "batch"])
def test_search_leaves_no_trace(stages, name, place, tmp_path):
    plain, *rest = run(stages, root=tmp_path)
    finder = finders()[name]
    found, *same = run(stages, **{place: [finder]}, root=tmp_path)
    assert_same(same, rest)
    assert_same(dict(found.state_dict()), dict(plain.state_dict()))
    if name == "rate":
        assert len(finder.optimal_lr.results["loss"]) == 7
    else:
        assert finder.optimal_batch_size == 8


@over(STAGES)
def test_both_searches_together(stages, tmp_path):
    plain, *rest = run(stages, root=tmp_path)
    found, *same = run(stages, before=finders().values(), root=tmp_path)
    assert_same(same, rest)
    assert_same(dict(found.state_dict()), dict(plain.state_dict()))


@over(STAGES)
def test_search_sees_the_rounded_network(stages, tmp_path):
    finder, seen = LearningRateFinder(num_training_steps=3, update_attr=False), []

    class Noticing(Searched):
        def training_step(self, batch, batch_idx):
            seen.append(all(q.calibrated for q in quantizers(self)) and len(list(quantizers(self))) > 0)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    trainer([finder, *stages()], root=tmp_path, max_epochs=1).fit(Noticing())
    assert len(seen) == 3 + 4 and all(seen)


@over(STAGES)
def test_found_values_are_used_and_leave_quantizer_rates_alone(stages, tmp_path):
    module = searched()
    chain = [LearningRateFinder(num_training_steps=20), BatchSizeFinder(init_val=4, max_trials=3), *stages()]
    with updates_of(module) as updates:
        trainer(chain, root=tmp_path, max_epochs=5).fit(module)
    own, users = ([u.rates[0] for u in updates if u.own is own] for own in (True, False))
    assert module.batch_size == 16 and len(own) == 10
    assert module.lr != 0.05 and users[-10:] == pytest.approx([module.lr] * 10)
    assert own == pytest.approx([1e-3] * 10)


@over({**STAGES, **DISTILLED})
@pytest.mark.parametrize("name", ["rate", "batch"])
def test_tuner_leaves_no_trace(stages, name, tmp_path):
    plain, *rest = run(stages, root=tmp_path)
    module, ranges = searched(), Ranges()
    made = trainer([*stages(), ranges], root=tmp_path, max_epochs=2)
    listed = list(made.callbacks)
    if name == "rate":
        found = Tuner(made).lr_find(module, num_training=7, update_attr=False)
        assert len(found.results["loss"]) == 7
    else:
        assert Tuner(made).scale_batch_size(module, init_val=8, max_trials=1, steps_per_trial=2) == 8
    assert made.callbacks == listed
    assert all(q.calibrated for q in quantizers(module))
    with updates_of(module) as updates:
        made.fit(module)
    own, users = ([u.gradients for u in updates if u.own is own] for own in (True, False))
    assert_same([ranges.state, own, users], rest)
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))


def test_other_callbacks_keep_their_order(tmp_path):
    others = [pl.Callback() for _ in range(4)]
    finder, both = LearningRateFinder(num_training_steps=2), BatchSizeFinder()
    chain = [others[0], Quantize(4, 4), others[1], FineTune(), others[2]]
    made = trainer([both, finder, *chain, others[3]], root=tmp_path)
    made.strategy.connect(searched())
    given = made.callbacks
    before = list(given)
    chain[1].setup(made, searched(), "fit")
    assert before == given  # the Trainer iterates over this list
    assert made.callbacks == [*chain[:4], both, finder, *chain[4:], others[3]]


# --- compilation ----------------------------------------------------------------------------------------------------


class Plain(Tiny):
    """A network that compiles fast, in a module that remembers nothing, which torch.compile would have to trace."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Inner(Plain):
    """Its network is compiled by the user."""

    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def plain(kind=Plain):
    torch.manual_seed(0)
    return kind()


@over(STAGES)
def test_quantizers_break_no_graph(stages):
    torch.compiler.reset()
    module = plain()
    fit(module, stages(), max_epochs=0)
    explained = torch._dynamo.explain(module.net.train())(dataset(8).tensors[0])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@over({**STAGES, **DISTILLED})
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # where a graph was broken
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_compiled_training_equals_eager(stages, where):
    torch.compiler.reset()
    module, reference = plain(Inner if where == "inside" else Plain), plain()
    made = trainer(stages())
    made.fit(torch.compile(module, backend="eager") if where == "outside" else module, loader(), loader(24))
    other = trainer(stages())
    other.fit(reference, loader(), loader(24))
    renamed = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    torch.testing.assert_close(renamed, dict(reference.state_dict()), rtol=1e-4, atol=1e-5)
    assert made.callback_metrics["val_loss"] == pytest.approx(float(other.callback_metrics["val_loss"]), rel=1e-4)


@over(STAGES)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_checkpoint_of_a_compiled_network_loads(stages, tmp_path):
    torch.compiler.reset()
    module = plain(Inner)
    fit(module, stages()).save_checkpoint(tmp_path / "saved.ckpt")
    x = dataset(8, seed=9).tensors[0]
    loaded = load_from_checkpoint(Inner, tmp_path / "saved.ckpt")
    assert torch.equal(loaded.eval()(x), module.eval()(x))


# --- strategies -----------------------------------------------------------------------------------------------------


@over(STAGES)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharding_strategies_are_refused(stages, kind, stage):
    class Own(kind):
        """A user's variant is no better."""

    quantize, module = stages()[0], tiny()
    made = trainer([quantize])
    for strategy in (kind, Own):
        made._accelerator_connector.strategy = strategy.__new__(strategy)  # DeepSpeed cannot be built without itself
        with pytest.raises(lq.StateError, match=rf"not work with {strategy.__name__}.*use Trainer\(strategy='ddp'\)"):
            quantize.setup(made, module, stage)
    assert not list(quantizers(module))


def test_ddp_strategies_are_not():
    class Own(DDPStrategy):
        pass

    for strategy in (DDPStrategy(), Own()):
        made, module = trainer([]), tiny()
        made._accelerator_connector.strategy = strategy
        strategy.connect(module)
        Quantize(4, None).setup(made, module, "fit")
        assert list(quantizers(module))


# --- resume and restore ---------------------------------------------------------------------------------------------


class Resumable(DataLoader):
    """A loader that shuffles by epoch and goes on where its state says, as Lightning asks of loaders."""

    def __init__(self):
        super().__init__(dataset(32), batch_size=8)
        self.epoch, self.given, self.resumed = -1, 0, False

    def __iter__(self):
        if not self.resumed:
            self.epoch, self.given = self.epoch + 1, 0
        self.resumed = False
        batches = torch.randperm(32, generator=torch.Generator().manual_seed(self.epoch)).split(8)
        while self.given < len(batches):
            self.given += 1
            yield self.collate_fn([self.dataset[i] for i in batches[self.given - 1]])

    def state_dict(self):
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state):
        self.epoch, self.given, self.resumed = state["epoch"], state["given"], True


SCHEDULED = {"scheduled": lambda: [Quantize(4, 4, fold_bn=False), FineTune("lsq", lr=0.01, schedule="cosine")]}


@over({**STAGES, **DISTILLED, **SCHEDULED})
@pytest.mark.parametrize("step", [3, 6, 9])
def test_resumes_in_the_middle_of_an_epoch(stages, step, tmp_path):
    def train(folder, seed, ckpt_path=None):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = tiny(seed, scheduler="step")
        fit(module, [*stages(), saver], Resumable(), max_epochs=3, enable_checkpointing=True, ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / "step=12.ckpt", weights_only=True), module

    straight, first = train("straight", 0)
    resumed, second = train("resumed", 3, tmp_path / "straight" / f"step={step}.ckpt")
    assert_same(second.seen, first.seen[step:])  # the loader did go on
    assert not torch.equal(first.seen[0], first.seen[4])
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(resumed[part], straight[part])
    own = [key for key in straight["callbacks"] if not key.startswith("ModelCheckpoint")]
    assert own
    assert_same([resumed["callbacks"][key] for key in own], [straight["callbacks"][key] for key in own])


@over({**PLAIN, **DISTILLED})
def test_checkpoint_saved_when_fit_is_over_resumes(stages, tmp_path):
    straight, half, resumed = tiny(), tiny(), tiny(3)
    fit(straight, stages(), max_epochs=4)
    fit(half, stages(), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, stages(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


@over(STAGES)
def test_fresh_module_and_callbacks_evaluate_a_checkpoint(stages, tmp_path):
    module = tiny()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    made = trainer([*stages(), saver], enable_checkpointing=True, max_epochs=2)
    made.fit(module, loader(), loader(24))
    data, path = loader(24), tmp_path / "last.ckpt"
    validated = made.validate(module, data, verbose=False)
    tested, predicted = made.test(module, data, verbose=False), made.predict(module, data)
    assert len(predicted) == 3

    def fresh():
        return trainer([*stages(), ModelCheckpoint(tmp_path / "none")], enable_checkpointing=True)

    assert fresh().validate(tiny(3), data, ckpt_path=path, verbose=False) == validated
    assert fresh().test(tiny(4), data, ckpt_path=path, verbose=False) == tested
    assert_same(fresh().predict(tiny(5), data, ckpt_path=path), predicted)
    again = made.validate(dataloaders=data, ckpt_path="best", verbose=False)
    assert again == validated
    loaded = load_from_checkpoint(Tiny, path)
    assert trainer().validate(loaded, data, verbose=False) == validated
    assert_same(trainer().predict(loaded, data), predicted)


class Late(Plain):
    """Builds its network in configure_model."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = Plain().net


@over({**STAGES, **DISTILLED})
def test_layers_built_in_configure_model_train_and_resume(stages, tmp_path):
    late, early, begin = Late(), plain(), Begin()
    fit(late, [*stages(), begin], max_epochs=2)
    begin.check_all_moved(late)
    fit(early, stages(), max_epochs=2)
    assert_same(dict(late.state_dict()), dict(early.state_dict()))
    check_resume(lambda seed: Late(), stages, tmp_path)
    tested = trainer(stages()).test(Late(), loader(24), ckpt_path=tmp_path / "straight" / "last.ckpt", verbose=False)
    again = trainer(stages()).test(Late(), loader(24), ckpt_path=tmp_path / "resumed" / "last.ckpt", verbose=False)
    assert tested == again
