"""Every recipe runs through LightningCLI to its end, twice alike; its checkpoint stands by itself."""

import inspect

import pytest
import torch

import lq
from lq.attachment.sites import is_attached
from lq.callbacks import FineTune, LearnNoiseScale
from lq.cli.timm_module import TimmClassifier
from tests.cli.running import SHORT, SILENT, TINY, succeeds, without_model
from tests.helpers import assert_same

pytestmark = SILENT

#: Arguments that make a recipe's work small, for those that have them.
SMALL = {"calibration_samples": 32, "samples": 32, "iterations": 2, "search_iterations": 2, "evaluations": 3}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs write into the folder they are in."""
    monkeypatch.chdir(tmp_path)


every = pytest.mark.parametrize("name", lq.recipe_names())


def arguments(name, **more):
    """Its short run: the overrides that its callbacks take, and an epoch if they train."""
    callbacks = lq.recipe(name)
    taken = {argument for callback in callbacks for argument in inspect.signature(type(callback)).parameters}
    trains = any(isinstance(callback, (FineTune, LearnNoiseScale)) for callback in callbacks)
    overrides = [f"--recipe.{key}={value}" for key, value in {**SMALL, **more}.items() if key in taken]
    return ["--recipe", name, *overrides, "--trainer.max_epochs", str(int(trains))]


def fitted(capsys, folder, *arguments):
    """The checkpoint that a fit leaves."""
    succeeds(capsys, "fit", *arguments, "--trainer.default_root_dir", folder)
    (path,) = folder.rglob("*.ckpt")
    return path, torch.load(path, weights_only=True)


@every
def test_it_runs_to_its_end_and_its_checkpoint_validates_by_itself(name, tmp_path, capsys):
    wanted = [*TINY, *arguments(name, shape="[1,6,6]")]
    path, content = fitted(capsys, tmp_path / "first", *wanted)
    _, again = fitted(capsys, tmp_path / "second", *wanted)
    assert_same(again["state_dict"], content["state_dict"])  # deterministic by seed
    steps = [value for key, value in content["state_dict"].items() if key.endswith("log2_step")]
    assert steps and all(step.isfinite().all() for step in steps)
    assert "val_loss" in succeeds(capsys, "validate", "--ckpt_path", path, *without_model(TINY))


@pytest.mark.slow
@every
def test_with_a_model_of_timm(name, tmp_path, capsys):
    wanted = [*SHORT, *arguments(name, shape="[3,16,16]")]
    path, content = fitted(capsys, tmp_path / "first", *wanted)
    _, again = fitted(capsys, tmp_path / "second", *wanted)
    assert_same(again["state_dict"], content["state_dict"])
    alone = TimmClassifier.load_from_checkpoint(path).eval()
    assert is_attached(alone)
    assert_same(alone.state_dict(), content["state_dict"])
    said = succeeds(capsys, "validate", "--ckpt_path", path, *without_model(SHORT), "--trainer.logger", "false")
    assert "val_accuracy" in said and "val_loss" in said
