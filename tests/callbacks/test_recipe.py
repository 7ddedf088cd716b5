"""`Recipe`: one callback that is the list of a recipe, wherever it stands."""

import copy
import inspect
import pickle
import re

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

import lq
from lq.callbacks import ExportModel, FineTune, Quantize, Recipe, Reconstruct
from tests.helpers import QUIET, assert_same, cli, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

SMALL = {"iterations": 2, "search_iterations": 2, "evaluations": 3, "shape": (1, 6, 6)}
every = pytest.mark.parametrize("name", lq.recipe_names())


def small(name, **more):
    taken = {argument for callback in lq.recipe(name) for argument in inspect.signature(type(callback)).parameters}
    return {**{key: value for key, value in SMALL.items() if key in taken}, **more}


class Hooks(pl.Callback):
    """Notes which callbacks the Trainer has, in every hook that a run calls."""

    def __init__(self):
        self.seen = []

    def setup(self, trainer, pl_module, stage):
        self.seen.append(("setup", stage))

    def _note(self, hook, trainer):
        self.seen.append((hook, [type(callback).__name__ for callback in trainer.callbacks]))

    def on_fit_start(self, trainer, pl_module):
        self._note("on_fit_start", trainer)

    def on_train_end(self, trainer, pl_module):
        self._note("on_train_end", trainer)

    def teardown(self, trainer, pl_module, stage):
        self._note("teardown", trainer)


def run(callbacks, tmp_path, seed=0, **options):
    module, hooks = tiny(seed), Hooks()
    made = trainer(
        [LearningRateMonitor(), *callbacks, hooks],
        root=tmp_path, max_epochs=2, enable_checkpointing=True, logger=pl.loggers.CSVLogger(tmp_path), **options,
    )  # fmt: skip
    pl.seed_everything(3)
    made.fit(module, loader(shuffle=True), loader())
    return made, module, hooks


def timeless(state):
    """The state of a callback without the seconds that its work took."""
    return {k: re.sub(r'"seconds": [^,}]*', "", v) if isinstance(v, str) else v for k, v in state.items()}


@every
def test_it_is_the_flat_list(name, tmp_path):
    """Same network to the bit, same callbacks in every hook, same checkpoint; of every recipe."""
    overrides = small(name)
    flat, expected, flat_hooks = run(lq.recipe(name, **overrides), tmp_path / "flat")
    one, module, hooks = run([Recipe(name, **overrides)], tmp_path / "one")
    assert_same(module.state_dict(), expected.state_dict())
    assert hooks.seen == flat_hooks.seen
    assert [type(c) for c in one.callbacks] == [type(c) for c in flat.callbacks]
    left, right = (torch.load(made.checkpoint_callback.best_model_path, weights_only=True) for made in (one, flat))
    assert list(left["callbacks"]) == list(right["callbacks"])
    for key in left["callbacks"]:
        if not key.startswith("ModelCheckpoint"):  # has the folder
            assert_same(timeless(left["callbacks"][key]), timeless(right["callbacks"][key]))
    assert_same(left["optimizer_states"], right["optimizer_states"])


@pytest.mark.parametrize("name", ["ptq_w8a8", "lsq_w4a4", "mpqco", "noise_scale_free", "qdrop", "brecq", "zeroq"])
def test_each_resumes_from_the_others_checkpoint(name, tmp_path):
    overrides = small(name)
    made, module, _ = run([Recipe(name, **overrides)], tmp_path)
    path = made.checkpoint_callback.best_model_path
    ended = []
    for callbacks in (lq.recipe(name, **overrides), [Recipe(name, **overrides)]):
        resumed = tiny(5)
        fit(resumed, callbacks, loader(), max_epochs=3, ckpt_path=path, root=tmp_path, logger=False)
        ended.append(resumed.state_dict())
    assert_same(*ended)
    validated = tiny(6)
    trainer([Recipe(name, **overrides)]).validate(validated, loader(), ckpt_path=path, verbose=False)
    assert_same(validated.state_dict(), module.state_dict())


def test_wherever_it_stands(tmp_path):
    """Before and behind other callbacks, of lq too, and beside another recipe."""
    quantize, finetune = Quantize(4, 4, fold_bn=False), FineTune(lr=0.01)
    flat = [*lq.recipe("lsq_w4a4"), ExportModel(tmp_path / "a.safetensors"), EarlyStopping("val_loss")]
    one = [Recipe("lsq_w4a4"), ExportModel(tmp_path / "b.safetensors"), EarlyStopping("val_loss")]
    ended = []
    for callbacks in (flat, one):
        module = tiny()
        made = trainer(callbacks, max_epochs=2)
        made.fit(module, loader(), loader())
        ended.append(module.state_dict())
        assert [type(c) for c in made.callbacks] == [type(c) for c in flat]
    assert_same(*ended)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    own = tmp_path / "tail.yaml"
    own.write_text("trainer: {callbacks+: [{class_path: lq.callbacks.FineTune, init_args: {lr: 0.02}}]}")
    made = trainer([quantize, LearningRateMonitor(), Recipe(str(own), lr=0.01)], logger=pl.loggers.CSVLogger(tmp_path))
    made.fit(first := tiny(), loader())
    fit(second := tiny(), [Quantize(4, 4, fold_bn=False), finetune])
    assert_same(first.state_dict(), second.state_dict())
    assert [type(c).__name__ for c in made.callbacks] == ["Quantize", "LearningRateMonitor", "FineTune"]


def test_a_callback_before_it_sees_the_whole_list():
    """Quantize looks for copies of the module in the list; those of a recipe behind it, too."""
    seen = []

    class Looking(Quantize):
        def _attach(self, trainer, module, stage):
            seen.extend(type(callback).__name__ for callback in trainer.callbacks)
            super()._attach(trainer, module, stage)

    with pytest.raises(lq.StateError, match="already, and not as this Quantize callback says"):
        fit(tiny(), [Looking(8, 8), Recipe("ptq_w8a8", weights=3)])
    assert seen[:2] == ["Looking", "Quantize"]


def test_one_object_in_several_runs_and_trainers():
    recipe = Recipe("lsq_w4a4")
    made = trainer([recipe])
    made.fit(module := tiny(), loader())
    before = copy.deepcopy(module.state_dict())
    assert recipe not in made.callbacks and made.callbacks == recipe.callbacks
    made.validate(module, loader(), verbose=False)
    made.test(module, loader(), verbose=False)
    assert made.callbacks == recipe.callbacks
    assert_same(module.state_dict(), before)
    fit(other := tiny(), [recipe])
    assert_same(other.state_dict(), before)


def test_a_trainer_of_one_callback():
    made = pl.Trainer(
        callbacks=Recipe("ptq_w8a8"), max_epochs=0, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    made.fit(module := tiny(), loader())
    assert lq.summary(module).average_bits == 8


def test_callbacks_log():
    """What the Trainer gives to its callbacks, the recipe's get, too."""
    made = trainer([Recipe("lsq_w4a4")])
    made.fit(module := tiny(), loader())
    assert all(callback.log == module.log for callback in made.callbacks)


def test_callbacks_that_the_module_brings_replace_those_of_the_recipe():
    class Own(type(tiny())):
        def configure_callbacks(self):
            return FineTune(lr=0.5)

    found = []
    for callbacks in (lq.recipe("ste_w4a4"), [Recipe("ste_w4a4")]):
        torch.manual_seed(0)
        made = trainer(callbacks)
        made.fit(module := Own(), loader())
        found.append((module.state_dict(), [type(c) for c in made.callbacks], made.callbacks[-1].lr))
    assert found[0][1:] == found[1][1:] and found[0][2] == 0.5
    assert_same(found[0][0], found[1][0])


def test_it_travels_to_other_processes():
    recipe = pickle.loads(pickle.dumps(Recipe("qdrop", weights=3)))
    assert repr(recipe) == "Recipe('qdrop', weights=3)"
    assert [type(c) for c in recipe.callbacks] == [Quantize, Reconstruct] and recipe.callbacks[0].weights == 3


# --- configs ----------------------------------------------------------------------------------------------------------

OPTIONS = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
ENTRY = {"class_path": "lq.callbacks.Recipe", "init_args": {"name": "qdrop", "overrides": {"weights": 3}}}


@pytest.mark.parametrize("how", ["overrides", "dict_kwargs"])
def test_in_a_config_of_the_users_own_cli(how, tmp_path):
    """It stands among the user's callbacks, in their one file: there is nothing for a later config to drop."""
    entry = {"class_path": "lq.callbacks.Recipe", "init_args": {"name": "qdrop", "overrides": {"weights": 3}}}
    if how == "dict_kwargs":
        entry = {"class_path": "lq.callbacks.Recipe", "init_args": {"name": "qdrop"}, "dict_kwargs": {"weights": 3}}
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {**OPTIONS, "callbacks": [entry, monitor]}}))
    found = [c for c in cli(tmp_path / "mine.yaml").trainer.callbacks if isinstance(c, (Recipe, LearningRateMonitor))]
    assert repr(found[0]) == "Recipe('qdrop', weights=3)" and len(found) == 2


def test_appended_to_the_users_config(tmp_path):
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {**OPTIONS, "callbacks": [monitor]}}))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [ENTRY]}}))
    callbacks = cli(tmp_path / "mine.yaml", tmp_path / "more.yaml").trainer.callbacks
    assert [type(c).__name__ for c in callbacks[:2]] == ["LearningRateMonitor", "Recipe"]


def test_on_the_command_line_of_the_users_own_cli(monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    args = [
        *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.callbacks+=lq.callbacks.Recipe"),
        *("--trainer.callbacks.name=qdrop", "--trainer.callbacks.overrides.weights=3"),
        *("--trainer.callbacks.overrides.iterations=5",),
    ]  # fmt: skip
    made = LightningCLI(
        type(tiny()), run=False, args=args, save_config_callback=None, seed_everything_default=False
    ).trainer
    assert repr(made.callbacks[0]) == "Recipe('qdrop', weights=3, iterations=5)"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("qdrp"), "there is no recipe 'qdrp'; did you mean qdrop"),
        (lambda: Recipe("qdrop", weigths=3), "no callback of recipe 'qdrop' takes 'weigths'; did you mean weights"),
        (lambda: Recipe("qdrop", {"weigths": 3}), "takes 'weigths'; did you mean weights"),
        (lambda: Recipe("qdrop", 3), "overrides=3: expected a mapping of arguments, such as {'weights': 3}"),
        (lambda: Recipe("qdrop", {"weights": 3}, weights=4), "'weights' is given twice, in overrides and by keyword"),
    ],
)
def test_errors_when_it_is_made(make, message):
    with pytest.raises(lq.RecipeError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "RichModelSummary", "TQDMProgressBar", "Timer"])
def test_callbacks_that_the_trainer_has_to_see_when_it_is_built(kind, tmp_path):
    entry = {"class_path": f"lightning.pytorch.callbacks.{kind}"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    if kind == "RichModelSummary":
        pytest.importorskip("rich")
    with pytest.raises(lq.RecipeError, match=f"has a {kind}, which a Trainer has to see while it is built; list"):
        Recipe(str(tmp_path / "own.yaml"))


def test_two_callbacks_with_one_state():
    with pytest.raises(lq.StateError, match=r"two Reconstruct with one state, with Recipe\('qdrop'\); a recipe brings"):
        fit(tiny(), [Recipe("qdrop"), Reconstruct()])


def test_checkpoints_stay_last(tmp_path):
    made = trainer([ModelCheckpoint(tmp_path), Recipe("lsq_w4a4")], enable_checkpointing=True)
    made.fit(tiny(), loader())
    assert [type(c).__name__ for c in made.callbacks] == ["Quantize", "FineTune", "ModelCheckpoint"]
