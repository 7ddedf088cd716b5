"""Recipes: every file of the folder builds, in Python and through Lightning's CLI; overrides and their errors."""

import inspect
import sys

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
from lq.configuration.recipe import recipe_path
from tests.helpers import QUIET, cli, fit, steps, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

OURS = (
    Quantize, AllocateBits, FineTune, LearnNoiseScale, OptimizeRanges, Reconstruct, ReduceBits, SynthesizeData,
)  # fmt: skip
EXPECTED = {"ptq_w8a8", "ste_w4a4", "lsq_w4a4", "lsq_w2a2", "mpqco", "rdoq", "hawq_v2"}
EXPECTED |= {"mpqco_finetune", "lsqplus_w2a2", "noise_scale_w4a4", "noise_scale_w2a2", "noise_scale_free"}
EXPECTED |= {"adaround", "brecq", "qdrop", "mrecg_modcap", "mrecg_loss", "nwq", "lapq", "zeroq", "best_ptq", "vit_w4a4"}

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
    first, second = lq.recipe(path, trust=["tests"], shared=5, two=6)
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


# --- files that do more, or other, than name callbacks ----------------------------------------------------------------


def own(tmp_path, *callbacks, **more):
    return write(tmp_path, yaml.safe_dump({"trainer": {"callbacks+": list(callbacks), **more}}))


def of(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


UNTRUSTED = {
    "a function": of("os.system", command="touch executed"),
    "a function of lq": of("lq.save", model=1, path="executed"),
    "a class that is no callback": of("subprocess.Popen", args="touch executed", shell=True),
    "a built-in": of("builtins.open", file="executed", mode="w"),
    "a private name": of("lq.callbacks._x.Thing"),
    "a dunder": of("lq.callbacks.__class__"),
    "dots": of("lq.callbacks..os.system", command="touch executed"),
    "no module": of("Quantize"),
    "a neighbour": of("lq.callbacks_evil.Thing"),
    "not a name": of("lq.callbacks.Quantize; import os"),
    "a module that is not imported": of("not_imported_yet.Thing"),
    "what a module of lq imports": of("lq.callbacks.trainer.data.DataLoader", dataset=[]),
    "a function of a module of lq": of("lq.callbacks.trainer.data.training_batches"),
    "an object among arguments": of("lq.callbacks.Quantize", weights=of("os.system", command="touch executed")),
    "an object in a list": of("lq.callbacks.Quantize", exclude=[of("builtins.exec", source="open('executed', 'w')")]),
    "an object in an object": of("lq.callbacks.Quantize", weights=of("lq.QuantSpec", bits=of("os.getcwd"))),
    "a module of lq": of("lq.callbacks.Quantize", weights=of("lq.cli.main")),
    "a class that lq imports": of("lq.callbacks.Quantize", weights=of("lq.files.reading.Path")),
}


@pytest.mark.parametrize("kind", UNTRUSTED)
def test_nothing_else_is_imported_or_called(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not_imported_yet.py").write_text("open('executed', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = own(tmp_path, UNTRUSTED[kind])
    with pytest.raises(lq.RecipeError, match=r"^own.yaml: ") as raised:
        lq.recipe(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()
    assert "not_imported_yet" not in sys.modules
    if "of a module of lq" not in kind and "what a module" not in kind:  # only names are looked at there
        with pytest.raises(lq.RecipeError, match=r"^own.yaml: "):
            recipe_path(path)


def test_packages_that_the_caller_trusts(tmp_path, monkeypatch):
    (tmp_path / "trusted_package").mkdir()
    (tmp_path / "trusted_package" / "mine.py").write_text(
        "import lightning.pytorch as pl\n\n\nclass Mine(pl.Callback):\n    def __init__(self, of=0):\n"
        "        self.of = of\n\n\nclass Other:\n    pass\n\n\ndef function():\n    open('executed', 'w')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = own(tmp_path, of("trusted_package.mine.Mine", of=of("trusted_package.mine.Other")))
    for trust in (["trusted_package"], ["trusted_package.mine"], ["os", "trusted_package"]):
        (mine,) = lq.recipe(path, trust=trust)
        assert type(mine).__name__ == "Mine" and type(mine.of).__name__ == "Other"
        assert recipe_path(path, trust=trust).samefile(path)
    for trust in ([], ["trusted"], ["trusted_package.mine.Mine"], ["mine"]):
        with pytest.raises(lq.RecipeError, match="trusted_package.mine.Mine is none of the callbacks"):
            lq.recipe(path, trust=trust)
    for other in ("function", "Other"):
        with pytest.raises(lq.RecipeError, match=f"trusted_package.mine.{other} is no callback"):
            lq.recipe(own(tmp_path, of(f"trusted_package.mine.{other}")), trust=["trusted_package"])
    with pytest.raises(lq.RecipeError, match=r"trust='trusted_package': expected a list of packages"):
        lq.recipe(path, trust="trusted_package")
    with pytest.raises(lq.RecipeError, match=r"trust=None: expected a list of packages, such as \['mypackage'\]"):
        lq.recipe(path, trust=None)
    (tmp_path / "trusted_package" / "ends.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(lq.RecipeError, match="trusted_package.ends.Mine cannot be imported: 3"):
        lq.recipe(own(tmp_path, of("trusted_package.ends.Mine")), trust=["trusted_package"])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lq.callbacks.Quantise", "lq.callbacks has no Quantise; did you mean Quantize"),
        ("lq.callbacks.os.system", "lq.callbacks.os.system cannot be imported"),
        ("lq.callbacks.export.ONNX", "has no ONNX"),
    ],
)
def test_the_path_of_a_recipe_of_callbacks_alone(name, message, tmp_path):
    for take in (lq.recipe, recipe_path):
        with pytest.raises(lq.RecipeError, match=message):
            take(own(tmp_path, of(name)))


@pytest.mark.parametrize("name", [None, 5, ["lsq_w4a4"]])
def test_a_recipe_has_a_name(name):
    for take in (lq.recipe, recipe_path):
        with pytest.raises(lq.RecipeError, match="a recipe is given by its name or the path of a file, not by"):
            take(name)


def test_objects_among_arguments_are_made(tmp_path):
    spec = of("lq.QuantSpec", bits=3, range="minmax")
    quantize, monitor = lq.recipe(
        own(
            tmp_path,
            of("lq.callbacks.Quantize", weights=spec),
            of("lightning.pytorch.callbacks.LearningRateMonitor", logging_interval="step"),
        )
    )
    assert quantize.weights == lq.QuantSpec(3, range="minmax")
    assert isinstance(monitor, LearningRateMonitor)


MISSPELT = {
    "a class": (of("lq.callbacks.Quantise"), "lq.callbacks has no Quantise; did you mean Quantize"),
    "a package": (of("lq.callback.Quantize"), r"did you mean lq.callbacks.Quantize\?"),
    "an argument": (
        of("lq.callbacks.Quantize", weigths=4),
        "Quantize takes no 'weigths'; did you mean weights",
    ),
    "a module": (of("lq.callbacks.quantise.Quantize"), "cannot be imported: No module named 'lq.callbacks.quantise'"),
    "a value": (of("lq.callbacks.Quantize", weights="four"), r"\(weights=...\): expected int or .*, got 'four'"),
    "a list": (of("lq.callbacks.Quantize", calibration_samples=[1]), r"samples=...\): expected int, got a list"),
    "a truth": (of("lq.callbacks.Quantize", weights=True), r"Quantize\(weights=...\): expected int or "),
    "a width": (of("lq.callbacks.Quantize", weights=9), r"Quantize\(weights=9\): bits=9 is not a width"),
    "a choice": (of("lq.callbacks.FineTune", lr="fast"), r"FineTune\(lr=...\): expected float or null, got 'fast'"),
}


@pytest.mark.parametrize("kind", MISSPELT)
def test_wrong_names_and_values_are_told_in_a_line(kind, tmp_path):
    callback, message = MISSPELT[kind]
    with pytest.raises(lq.RecipeError, match=message) as raised:
        lq.recipe(own(tmp_path, callback))
    assert "\n" not in str(raised.value) and str(raised.value).startswith("own.yaml: ")


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    """As in Lightning's CLI; YAML 1.1 takes them for texts."""
    text = "trainer: {callbacks+: [{class_path: lq.callbacks.FineTune, init_args: {lr: 1e-3}}]}"
    assert lq.recipe(write(tmp_path, text))[0].lr == 0.001


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
START = "trainer:\n  callbacks+:\n    - class_path: lq.callbacks.Quantize\n"
TEXTS = {
    "aliases that unfold": (BILLION, "its aliases unfold into more than 100000 values"),
    "an alias of itself": ("a: &a [*a]", "an alias contains itself"),
    "nothing behind a key": (START + "      init_args: {weights: [4", "line 4, column .*: no YAML of plain values"),
    "a tab": ("trainer:\n\tcallbacks+: []", "line 2, column 1: no YAML"),
    "an object of Python": (
        START + "      init_args: {weights: !!python/object/apply:os.system ['touch executed']}",
        "line 4, column .*: no YAML of plain values: could not determine a constructor",
    ),
    "a key twice": (START + "      class_path: os.system", "line 3: the key 'class_path' is there twice"),
    "a date that is none": ("trainer: 2020-99-99", "no YAML of plain values"),
    "a huge integer": ("trainer: " + "9" * 6000, "no YAML of plain values|got 9999"),
    "nested": ("[" * 3000, "nested too deeply|no YAML"),
    "two documents": ("a: 1\n---\nb: 2", "no YAML of plain values: but found another document"),
    "another key": ("model: 3\n" + START, "expected no key 'model'"),
    "a key of the Trainer": ("trainer: {callbacks+: [], max_epochs: 3}", "at 'trainer': expected no key 'max_epochs'"),
    "without plus": ("trainer: {callbacks: []}", r"the key 'callbacks\+'"),
    "a name that is none": ("trainer: {callbacks+: [{class_path: 3}]}", "at .*class_path': expected a text, got 3"),
    "an entry with more": ("trainer: {callbacks+: [{class_path: a.B, init_arg: {}}]}", "did you mean 'init_args'"),
    "arguments in a list": ("trainer: {callbacks+: [{class_path: a.B, init_args: [1]}]}", "expected an object, got"),
    "large": ("# " + "x" * 300_000, "own.yaml is larger than 262144 bytes"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_that_are_no_recipe(kind, tmp_path, monkeypatch):
    text, message = TEXTS[kind]
    monkeypatch.chdir(tmp_path)
    for read in (lq.recipe, recipe_path):
        with pytest.raises(lq.RecipeError, match=message) as raised:
            read(write(tmp_path, text))
        assert "\n" not in str(raised.value) and "own.yaml" in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_aliases_that_unfold_into_little_are_fine(tmp_path):
    text = (
        "trainer:\n  callbacks+:\n    - class_path: lq.callbacks.Quantize\n      init_args: {weights: &w 3, "
        "activations: *w}\n"
    )
    (quantize,) = lq.recipe(write(tmp_path, text))
    assert (quantize.weights, quantize.activations) == (3, 3)


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "no text in UTF-8"), (b"\xef\xbb\xbf", None)])
def test_bytes_of_other_kinds(content, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(content + recipe_path("ptq_w8a8").read_bytes())
    if message is None:
        assert [type(callback) for callback in lq.recipe(str(path))] == [Quantize]
    else:
        with pytest.raises(lq.RecipeError, match=message):
            lq.recipe(str(path))


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 5000])
def test_names_that_no_file_has(name):
    with pytest.raises(lq.RecipeError, match="there is no recipe"):
        lq.recipe(name)
