"""lq fit, validate, test and predict: recipes by name, the model of a checkpoint, and how wrong options are told."""

import csv

import lightning.pytorch as pl
import pytest
import torch
import yaml

import lq
from lq.callbacks import AllocateBits, FineTune, Quantize
from lq.cli import main
from lq.cli.data import DigitsData
from lq.cli.timm_module import TimmClassifier
from lq.cli.training import QuantizationCLI, arguments_of
from lq.cli.usage import UsageError
from tests.cli.running import SHORT, SILENT, TINY, TinyData, complains, succeeds, without_model
from tests.helpers import Tiny, assert_same, loader

pytestmark = SILENT

QUIET_RUN = ("--trainer.logger", "false", "--trainer.max_epochs", "0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs write into the folder they are in."""
    monkeypatch.chdir(tmp_path)


class Kept(pl.Callback):
    """Keeps the Trainer of the last run."""

    trainer: pl.Trainer

    def setup(self, trainer, pl_module, stage):
        Kept.trainer = trainer


KEPT = ("--trainer.callbacks+", f"{__name__}.Kept")


def callbacks_of(capsys, *arguments):
    """Those of lq in the Trainer of a run, and one before them."""
    succeeds(capsys, "fit", *TINY, "--trainer.max_epochs", "0", *arguments)
    found = [c for c in Kept.trainer.callbacks if isinstance(c, (Kept, Quantize, AllocateBits, FineTune))]
    return [type(c).__name__ for c in found], found


# --- recipes by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ["--recipe", "mpqco", "--recipe.weights", "3", "--recipe.budget", "16x", *KEPT],
        [*KEPT, "--recipe.budget=16x", "--recipe=mpqco", "--recipe.weights=3"],
        ["--config", "recipe:mpqco", *KEPT, "--recipe.weights", "3", "--recipe.budget", "16x"],
        [*KEPT, "--recipe.name", "mpqco", "--recipe.overrides", '{"weights": 3, "budget": "16x"}'],
    ],
)
def test_a_recipe_wherever_it_stands(given, tmp_path, capsys):
    names, found = callbacks_of(capsys, *given, "--trainer.default_root_dir", tmp_path)
    assert names == ["Kept", "Quantize", "AllocateBits", "FineTune"]
    assert (found[1].weights, found[2].budget, found[2].bits) == (3, "16x", [1, 2, 3, 4, 5, 6, 7, 8])


def test_a_recipe_before_a_config_that_has_callbacks(tmp_path, capsys):
    """What LightningCLI drops without a word if the recipe is a config."""
    entry = {"class_path": f"{__name__}.Kept"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    given = ["--config", "recipe:lsq_w4a4", "--config", tmp_path / "own.yaml", "--trainer.default_root_dir", tmp_path]
    assert callbacks_of(capsys, *given)[0] == ["Kept", "Quantize", "FineTune"]


def test_a_recipe_in_a_config(tmp_path, capsys):
    content = {"recipe": {"name": "lsq_w4a4", "overrides": {"weights": 3}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    names, found = callbacks_of(
        capsys, *KEPT, "--config", tmp_path / "own.yaml", "--trainer.default_root_dir", tmp_path
    )
    assert names == ["Kept", "Quantize", "FineTune"] and found[1].weights == 3
    saved = yaml.safe_load((tmp_path / "lq_config.yaml").read_text())
    assert saved["recipe"]["name"] == "lsq_w4a4" and saved["recipe"]["overrides"] == {"weights": 3}


def test_a_saved_config_runs_again(tmp_path, capsys):
    given = ["--recipe", "lsq_w4a4", "--recipe.weights", "3", *KEPT, "--trainer.default_root_dir", tmp_path]
    callbacks_of(capsys, *given)
    first = Kept.trainer.lightning_module.state_dict()
    succeeds(capsys, "fit", "--config", tmp_path / "lq_config.yaml")
    assert_same(Kept.trainer.lightning_module.state_dict(), first)


def test_a_file_of_ones_own_as_recipe(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text(succeeds(capsys, "recipes", "show", "ptq_w8a8", "weights=3"))
    names, found = callbacks_of(capsys, *KEPT, "--recipe", own, "--trainer.default_root_dir", tmp_path)
    assert names == ["Kept", "Quantize"] and found[1].weights == 3


def test_it_is_what_python_does(tmp_path, capsys):
    given = ["--recipe", "lsq_w4a4", "--trainer.max_epochs", "1", *KEPT]
    succeeds(capsys, "fit", *TINY, *given, "--trainer.default_root_dir", tmp_path)
    pl.seed_everything(7)
    module, data = Tiny(), TinyData()
    own = pl.Trainer(
        callbacks=lq.recipe("lsq_w4a4"), max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    own.fit(module, data)
    assert_same(Kept.trainer.lightning_module.state_dict(), module.state_dict())


def test_a_command_line_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    made = QuantizationCLI(
        Tiny,
        TinyData,
        args=arguments_of(["--recipe", "mpqco", "--recipe.weights=3", "--trainer.logger=false", *KEPT]),
        run=False,
        save_config_callback=None,
        seed_everything_default=1,
    )
    found = [c for c in made.trainer.callbacks if isinstance(c, (Kept, Quantize, AllocateBits, FineTune))]
    assert [type(c).__name__ for c in found] == ["Kept", "Quantize", "AllocateBits", "FineTune"]
    assert found[1].weights == 3


# --- a model of timm, from fit to predict -----------------------------------------------------------------------------


def test_from_fit_to_predict(tmp_path, capsys):
    options = ["--trainer.max_epochs", "1", "--trainer.default_root_dir", tmp_path]
    optimizer = ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.01", "--model.lr_scheduler", "StepLR"]
    optimizer += ["--model.lr_scheduler.step_size", "1", *KEPT]
    succeeds(capsys, "fit", *SHORT, *optimizer, *options, "--recipe", "lsq_w4a4", "--recipe.calibration_samples", "16")
    assert isinstance(Kept.trainer.optimizers[0], torch.optim.SGD)
    assert Kept.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-4)  # the recipe's cosine
    (path,) = tmp_path.rglob("*.ckpt")
    rest = [*without_model(SHORT), "--trainer.logger", "false", "--trainer.default_root_dir", tmp_path]
    said = [succeeds(capsys, command, "--ckpt_path", path, *rest) for command in ("validate", "test")]
    assert "val_accuracy" in said[0] and "test_accuracy" in said[1]
    succeeds(capsys, "predict", "--ckpt_path", path, *rest, "--predictions", tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert list(rows[0]) == ["image", "class", "name", "probability"] and len(rows) == 32
    module = TimmClassifier.load_from_checkpoint(path).eval()
    data = DigitsData(batch_size=32, image_size=16, data_config=module.data_config)
    data.setup("predict")
    with torch.no_grad():
        expected = module(next(iter(data.predict_dataloader()))[0]).softmax(1)
    assert [int(row["class"]) for row in rows] == expected.argmax(1).tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.max(1).values.tolist(), abs=1e-4)


def test_weights_of_a_file_and_a_recipe(tmp_path, capsys):
    torch.manual_seed(3)
    source = TimmClassifier("test_resnet", num_classes=10)
    torch.save(source.model.state_dict(), tmp_path / "w.pth")
    given = [*QUIET_RUN, "--model.checkpoint", tmp_path / "w.pth", *KEPT, "--trainer.default_root_dir", tmp_path]
    succeeds(capsys, "fit", *SHORT, *given)
    assert_same(Kept.trainer.lightning_module.model.state_dict(), source.model.state_dict())


# --- errors -----------------------------------------------------------------------------------------------------------

OTHER = {
    "unknown recipe": (["--recipe", "qdrp"], "lq fit: there is no recipe 'qdrp'; did you mean qdrop?"),
    "unknown recipe as config": (["--config", "recipe:qdrp"], "lq fit: there is no recipe 'qdrp'; did you mean qdrop?"),
    "misspelt override": (
        ["--recipe", "qdrop", "--recipe.weigths", "3"],
        "lq fit: no callback of recipe 'qdrop' takes 'weigths'; did you mean weights?",
    ),
    "wrong override": (["--recipe", "qdrop", "--recipe.weights", "9"], "lq fit: bits=9 is not a width"),
    "two recipes": (
        ["--recipe", "qdrop", "--recipe", "nwq"],
        "lq fit: --recipe qdrop and --recipe nwq: expected one recipe; further callbacks go into trainer.callbacks",
    ),
    "overrides of nothing": (
        ["--recipe.weights", "3"],
        "lq fit: --recipe: the following arguments are required: name; see lq fit --help",
    ),
    "no value": (["--recipe"], "lq fit: --recipe: expected a value"),
    "misspelt option": (["--trainer.max_epoks", "3"], "lq fit: .*did you mean --trainer.max_epochs"),
    "misspelt option of data": (["--data.image_siz", "3"], "lq fit: .*did you mean --data.image_size"),
    "misspelt option of the model": (["--model.nam", "x"], "lq fit: .*did you mean --model.name"),
    "a wrong value": (["--trainer.max_epochs", "many"], "lq fit: --trainer.max_epochs: expected int, got many"),
    "misspelt data": (
        ["--data", "DigitData"],
        "lq fit: --data DigitData: there is no such data module; did you mean Dig",
    ),
    "unknown model": (["--model.name", "resnt18"], "lq fit: timm cannot make 'resnt18', .*; did you mean resnet18"),
    "no config": (["--config", "nowhere.yaml"], "lq fit: --config: File does not exist: .*nowhere.yaml"),
    "other classes": (
        ["--model.num_classes", "7"],
        "lq fit: scikit-learn's digits has 10 classes, the model has 7; .*--model.num_classes 10",
    ),
    "no folder": (
        ["--data", "ImageFolderData", "--data.folder", "nowhere", "--data.workers", "0"],
        "lq fit: there is no folder nowhere",
    ),
    "no weights": (["--model.checkpoint", "nowhere.pth"], "lq fit: there is no file nowhere.pth"),
    "no checkpoint": (["--ckpt_path", "nowhere.ckpt"], "lq fit: there is no file nowhere.ckpt"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_errors_are_one_line(kind, capsys, tmp_path, monkeypatch):
    import re

    arguments, message = OTHER[kind]
    monkeypatch.chdir(tmp_path)
    assert re.match(message, complains(capsys, "fit", *SHORT, *QUIET_RUN, *arguments))


def test_no_model(capsys):
    message = "lq validate: --model: the following arguments are required: name; see lq validate --help"
    assert complains(capsys, "validate", "--data", "DigitsData") == message


def test_a_checkpoint_of_another_model(tmp_path, capsys):
    torch.manual_seed(0)
    other = TimmClassifier("test_vit", num_classes=10)
    torch.save({"state_dict": other.state_dict(), "pytorch-lightning_version": pl.__version__}, tmp_path / "a.ckpt")
    torch.save(other.model.state_dict(), tmp_path / "b.pth")
    said = complains(capsys, "validate", *SHORT, "--trainer.logger", "false", "--ckpt_path", tmp_path / "a.ckpt")
    assert (
        "the checkpoint is not of this TimmClassifier: it has no model.conv1" in said and "num_classes of the" in said
    )
    said = complains(capsys, "fit", *SHORT, *QUIET_RUN, "--model.checkpoint", tmp_path / "b.pth")
    assert "b.pth: the checkpoint is not of this ResNet: it has no conv1" in said
    rest = [*without_model(SHORT), "--trainer.logger", "false"]
    said = complains(capsys, "validate", *rest, "--ckpt_path", tmp_path / "a.ckpt")
    assert said.endswith("a.ckpt does not say what model it is of; name it, --model.name resnet18")


def test_short_forms():
    assert arguments_of(["-c=recipe:nwq", "-c", "a.yaml", "--x"]) == ["--recipe.name=nwq", "-c", "a.yaml", "--x"]
    with pytest.raises(UsageError, match="expected one recipe"):
        arguments_of(["--recipe=nwq", "--config=recipe:qdrop"])


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("usage: lq")
        and f" {command} " in said.splitlines()[0]
        and "--recipe" in said
        and "--trainer.max_epochs" in said
    )


def test_data_of_the_tests_are_as_they_say():
    assert len(loader(16)) == 2
