"""Recipes: every file of the folder builds, in Python and through Lightning's CLI; overrides and their errors."""

import inspect

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor

import lq
from lq.callbacks import (
    AllocateBits,
    FineTune,
    LearnNoiseScale,
    OptimizeRanges,
    Quantize,
    Reconstruct,
    ReduceBits,
    SynthesizeData,
)
from lq.recipe import recipe_path
from tests.helpers import QUIET, cli, fit, steps, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

OURS = (
    Quantize, AllocateBits, FineTune, LearnNoiseScale, OptimizeRanges, Reconstruct, ReduceBits, SynthesizeData,
)  # fmt: skip
EXPECTED = {"ptq_w8a8", "ste_w4a4", "lsq_w4a4", "lsq_w2a2", "mpqco", "rdoq", "hawq_v2"}
EXPECTED |= {"mpqco_finetune", "lsqplus_w2a2", "noise_scale_w4a4", "noise_scale_w2a2", "noise_scale_free"}
EXPECTED |= {"adaround", "brecq", "qdrop", "mrecg_modcap", "mrecg_loss", "nwq", "lapq", "zeroq", "best_ptq"}

#: Arguments that make a recipe's work small, for those that have them.
SMALL = {"iterations": 2, "search_iterations": 2, "evaluations": 3, "shape": (1, 6, 6)}

every = pytest.mark.parametrize("name", lq.recipe_names())


def entries(name):
    return yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))["trainer"]["callbacks+"]


def test_the_first_recipes_are_there():
    assert set(lq.recipe_names()) >= EXPECTED


@every
def test_a_recipe_is_callbacks_and_nothing_else(name):
    content = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    assert list(content) == ["trainer"]
    assert list(content["trainer"]) == ["callbacks+"]
    assert all(set(entry) <= {"class_path", "init_args"} for entry in content["trainer"]["callbacks+"])


@every
def test_a_recipe_builds_what_it_says(name):
    built = lq.recipe(name)
    assert [f"lq.callbacks.{type(c).__name__}" for c in built] == [entry["class_path"] for entry in entries(name)]
    for callback, entry in zip(built, entries(name), strict=True):
        for argument, value in entry["init_args"].items():
            assert getattr(callback, argument) == value
    assert lq.recipe(name)[0] is not built[0]


@every
def test_a_recipe_says_what_it_is(name):
    comments = [line for line in recipe_path(name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(comments)
    assert "Source:" in text and "Command:" in text


@every
def test_a_recipe_runs(name):
    module = tiny()
    taken = {argument for callback in lq.recipe(name) for argument in inspect.signature(type(callback)).parameters}
    fit(module, lq.recipe(name, **{argument: value for argument, value in SMALL.items() if argument in taken}))
    assert steps(module) and all(step.isfinite().all() for step in steps(module))


@every
def test_cli_appends_a_recipe_to_the_users_callbacks(name, tmp_path):
    mine = tmp_path / "mine.yaml"
    name_of = "lightning.pytorch.callbacks.LearningRateMonitor"
    monitor = {"class_path": name_of, "init_args": {"logging_interval": "step"}}
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "callbacks": [monitor]}
    mine.write_text(yaml.safe_dump({"trainer": options}))
    callbacks = cli(mine, recipe_path(name)).trainer.callbacks
    kinds = [type(c) for c in callbacks if isinstance(c, (LearningRateMonitor, *OURS))]
    assert kinds == [LearningRateMonitor, *(type(c) for c in lq.recipe(name))]
    built = [c for c in callbacks if type(c) in OURS]
    for callback, entry in zip(built, entries(name), strict=True):
        for argument, value in entry["init_args"].items():
            assert getattr(callback, argument) == value


@every
def test_an_override_reaches_every_callback_with_that_argument(name):
    for index, original in enumerate(lq.recipe(name)):
        for argument in inspect.signature(type(original)).parameters:
            if argument in ("weights", "calibration_samples", "quantizer_lr", "reestimate_bn"):
                assert getattr(lq.recipe(name, **{argument: 3})[index], argument) == 3
                assert getattr(original, argument) != 3


class First(pl.Callback):
    def __init__(self, shared: int = 0, one: int = 0):
        self.shared, self.one = shared, one


class Second(pl.Callback):
    def __init__(self, shared: int = 0, two: int = 0):
        self.shared, self.two = shared, two


def write(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


def test_an_override_reaches_all_callbacks_that_share_it(tmp_path):
    items = [{"class_path": f"{__name__}.{c.__name__}", "init_args": {"shared": 1}} for c in (First, Second)]
    path = write(tmp_path, yaml.safe_dump({"trainer": {"callbacks+": items}}))
    first, second = lq.recipe(path, shared=5, two=6)
    assert (first.shared, first.one, second.shared, second.two) == (5, 0, 5, 6)


def test_an_override_goes_where_the_recipe_has_it():
    """A width for activations is no budget for `AllocateBits`, which has an argument of that name."""
    quantize, allocate, *_ = lq.recipe("best_ptq", activations=3)
    assert quantize.activations == 3 and allocate.activations is None
    assert all(callback.seed == 5 for callback in lq.recipe("best_ptq", seed=5)[2:])  # the recipe says nothing of it


def test_an_override_that_no_callback_takes():
    with pytest.raises(
        lq.RecipeError, match=r"no callback of recipe 'ptq_w8a8' takes 'weight'; did you mean .*weights"
    ):
        lq.recipe("ptq_w8a8", weight=4)
    with pytest.raises(lq.RecipeError, match="takes 'quantizer_lr'"):
        lq.recipe("ptq_w8a8", quantizer_lr=0.1)


def test_an_unknown_recipe():
    with pytest.raises(lq.RecipeError, match="there is no recipe 'ptq_w8a'; did you mean ptq_w8a8"):
        lq.recipe("ptq_w8a")


@pytest.mark.parametrize("text", ["", "trainer: {}", "trainer:\n  callbacks+: [{}]", "- 1"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    with pytest.raises(lq.RecipeError, match=r"own.yaml is no recipe: expected callbacks under"):
        lq.recipe(write(tmp_path, text))
