"""lq recipes: what it lists and prints builds the same callbacks again, for LightningCLI and for Hydra."""

import pytest
import yaml

import lq
from lq.cli import main
from lq.cli.recipes import overrides_of, shown
from lq.cli.usage import UsageError
from lq.configuration.recipe import recipe_entries, recipe_path
from tests.cli.running import complains, succeeds
from tests.helpers import cli, fit, tiny

every = pytest.mark.parametrize("name", lq.recipe_names())


def arguments_of(callbacks):
    """The callbacks with the public values that they were made with."""
    return [
        (type(callback), {k: v for k, v in vars(callback).items() if not k.startswith("_")}) for callback in callbacks
    ]


def test_it_lists_every_recipe(capsys):
    lines = succeeds(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == lq.recipe_names()
    assert all(len(line) < 130 for line in lines)


@every
def test_without_overrides_it_is_the_file(name, capsys):
    assert succeeds(capsys, "recipes", "show", name) == recipe_path(name).read_text(encoding="utf-8")


@every
def test_what_it_prints_is_a_recipe(name, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text(succeeds(capsys, "recipes", "show", name, "weights=3", "calibration_samples=64"), encoding="utf-8")
    expected = lq.recipe(name, weights=3, calibration_samples=64)
    assert arguments_of(lq.recipe(str(mine))) == arguments_of(expected)
    text = mine.read_text(encoding="utf-8")
    assert f"# Made by: lq recipes show {name} weights=3 calibration_samples=64\n" in text and "Source: " in text


@pytest.mark.filterwarnings("ignore")
def test_it_goes_behind_a_config_of_lightnings_cli(tmp_path, capsys):
    mine, own = tmp_path / "mine.yaml", tmp_path / "own.yaml"
    mine.write_text(succeeds(capsys, "recipes", "show", "mpqco", "budget=10.66x", "bits=[2, 4]"), encoding="utf-8")
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    own.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [monitor]}}))
    callbacks = cli(own, mine).trainer.callbacks
    assert [type(c).__name__ for c in callbacks[:4]] == ["LearningRateMonitor", "Quantize", "AllocateBits", "FineTune"]
    assert (callbacks[2].budget, callbacks[2].bits) == ("10.66x", [2, 4])


def test_overrides_reach_any_callback():
    """In a LightningCLI only values of the last one can be overridden on the command line."""
    entries = recipe_entries("best_ptq", weights=3, budget="6x", iterations=7)
    found = [entry["init_args"] for entry in entries]
    assert found[0]["weights"] == 3 and found[1]["budget"] == "6x"
    assert found[2]["iterations"] == found[3]["iterations"] == 7
    assert list(found[0]) == ["weights", "activations", "skip", "symmetric", "calibration_samples"]


# --- Hydra ------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("overrides", [{}, {"calibration_samples": 64, "weights": 3}], ids=["as it is", "overridden"])
def test_hydra_builds_the_same_callbacks(name, overrides):
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    config = OmegaConf.create(shown(name, overrides, hydra=True))
    built = list(hydra.utils.instantiate(config.callbacks))
    assert arguments_of(built) == arguments_of(lq.recipe(name, **overrides))
    assert all(type(value) is not type(config) for one in built for value in vars(one).values())


def test_hydra_writes_objects_among_arguments(tmp_path):
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    spec = {"class_path": "lq.QuantSpec", "init_args": {"bits": 3, "range": "minmax"}}
    entry = {"class_path": "lq.callbacks.Quantize", "init_args": {"weights": spec, "exclude": ["a", "b"]}}
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    config = OmegaConf.create(shown(str(own), {}, hydra=True))
    (quantize,) = hydra.utils.instantiate(config.callbacks)
    assert quantize.weights == lq.QuantSpec(3, range="minmax")
    assert config.callbacks[0].exclude == ["a", "b"]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_from_hydra_with_a_recipe_by_name():
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    config = OmegaConf.create("{_target_: lq.callbacks.Recipe, name: lsq_w4a4, weights: 3}")
    fit(one := tiny(), [hydra.utils.instantiate(config)])
    listed = OmegaConf.create(shown("lsq_w4a4", {"weights": 3}, hydra=True))
    fit(other := tiny(), list(hydra.utils.instantiate(listed.callbacks)))
    assert all(
        (value == one.state_dict()[key]).all() for key, value in other.state_dict().items() if key[-5:] != "state"
    )


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qdrp"], "lq recipes: there is no recipe 'qdrp'; did you mean qdrop?"),
        (["qdrop", "weigths=3"], "lq recipes: no callback of recipe 'qdrop' takes 'weigths'; did you mean weights?"),
        (["qdrop", "weights"], "lq recipes: weights: expected KEY=VALUE, such as weights=3"),
        (["qdrop", "3=3"], "lq recipes: 3=3: expected KEY=VALUE, such as weights=3"),
        (["qdrop", "weights=3", "weights=4"], "lq recipes: weights=4: weights is given twice"),
        (["qdrop", "weights=[3"], "lq recipes: weights=[3: line 1, column 3: no YAML of plain values"),
        (["qdrop", "weights=9"], "lq recipes: bits=9 is not a width"),
    ],
)
def test_errors(arguments, message, capsys):
    assert complains(capsys, "recipes", "show", *arguments).startswith(message)


def test_values_are_those_of_yaml():
    assert overrides_of(["a=1e-3", "b=null", "c=8x", "d=a=b"]) == {"a": 0.001, "b": None, "c": "8x", "d": "a=b"}
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        overrides_of(["=3"])


@pytest.mark.parametrize("command", ["recipes --help", "recipes show --help"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: lq recipes")
