"""Quantize: attaching, calibrating, refusing, and honest numbers."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.attachment.sites import is_attached, quantizers
from lq.callbacks import FineTune, LearnNoiseScale, Quantize, Reconstruct, load_from_checkpoint
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, steps, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Probe(pl.Callback):
    """Notes what the module looks like when setup and on_fit_start are over."""

    def setup(self, trainer, pl_module, stage):
        self.attached = is_attached(pl_module)
        self.norms = [m for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.calibrated_in_setup = all(q.calibrated for q in quantizers(pl_module))

    def on_fit_start(self, trainer, pl_module):
        self.calibrated = all(q.calibrated for q in quantizers(pl_module))


@pytest.mark.parametrize("fold", [True, False])
def test_attaches_in_setup_and_calibrates_when_fitting_starts(fold):
    probe, module = Probe(), tiny()
    fit(module, [Quantize(4, 4, fold_bn=fold), probe], max_epochs=0)
    assert probe.attached
    assert len(probe.norms) == (0 if fold else 2)
    assert not probe.calibrated_in_setup
    assert probe.calibrated


def test_ranges_are_those_of_calibrate():
    module, by_hand = tiny(), tiny()
    fit(module, [Quantize(4, 4, calibration_samples=16)], max_epochs=0)
    lq.fold_batchnorm(by_hand)
    lq.attach(by_hand, 4, 4)
    lq.calibrate(by_hand, list(loader())[:2])
    assert_same(dict(module.state_dict()), dict(by_hand.state_dict()))


def test_second_fit_with_the_same_arguments_changes_nothing():
    module = tiny()
    fit(module, [Quantize(4, 4)], max_epochs=0)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    fit(module, [Quantize(4, 4)], loader(samples=8), max_epochs=0)
    assert_same(dict(module.state_dict()), state)


@pytest.mark.parametrize("other", [Quantize(2, 4), Quantize(4, 8), Quantize(4, 4, exclude="net.3")])
def test_second_fit_with_other_arguments_is_an_error(other):
    module = tiny()
    fit(module, [Quantize(4, 4)], max_epochs=0)
    with pytest.raises(lq.StateError, match=r"quantized already.*lq.detach\(module\) first"):
        fit(module, [other], max_epochs=0)


@pytest.mark.parametrize(
    "make",
    [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(swa_lrs=0.01)],
    ids=["average", "ema", "swa"],
)
def test_averaging_before_quantize_is_an_error(make):
    with pytest.raises(lq.StateError, match="list Quantize before it in Trainer"):
        fit(tiny(), [make(), Quantize()])


def test_averaging_after_quantize_works():
    module = tiny()
    fit(module, [Quantize(4, 4), EMAWeightAveraging(decay=0.5)])
    assert all(q.calibrated for q in quantizers(module))
    assert all((q.bits == q.bits.round()).all() for q in quantizers(module))


def test_empty_loader():
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.long)), batch_size=8)
    with pytest.raises(lq.DataError, match="Calibrating got no batches: the Trainer's training data are empty"):
        fit(tiny(), [Quantize()], empty, max_epochs=0)


def test_no_batches_by_limit():
    with pytest.raises(lq.DataError, match="got no batches"):
        fit(tiny(), [Quantize()], limit_train_batches=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite(value):
    x, y = (t.clone() for t in dataset().tensors)
    x[3] = value
    with pytest.raises(lq.DataError, match=r"net\.\d.*(NaN|Inf|inf|nan)"):
        fit(tiny(), [Quantize()], DataLoader(TensorDataset(x, y), batch_size=8), max_epochs=0)


class Images(torch.utils.data.Dataset):
    """Samples as dictionaries."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        x, y = dataset(16)[index]
        return {"image": x, "label": y}


class OnDicts(Tiny):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])


class WithCalibrationStep(OnDicts):
    def calibration_step(self, batch):
        self.calibrated_on = batch["image"].shape
        return self(batch["image"])


class OnOtherDicts(Tiny):
    def training_step(self, batch, batch_idx):
        return self(batch["picture"]).sum()


def test_a_batch_the_module_does_not_take():
    with (
        pytest.warns(UserWarning, match=r"OnOtherDicts could not be looked at.*layers are quantized by their class"),
        pytest.raises(
            lq.DataError,
            match=r"did not take a batch of dict\(image: Tensor.*; pass forward=.*training_step was tried too"
            r".*the training_step of OnOtherDicts failed.*KeyError: 'picture'",
        ),
    ):
        fit(OnOtherDicts(), [Quantize()], DataLoader(Images(), batch_size=8))


def test_training_step_tells_how_to_run_such_a_batch():
    module = tiny_of(OnDicts)
    quantize = Quantize(first_last=None, calibration_samples=16)
    fit(module, [quantize], DataLoader(Images(), batch_size=8), max_epochs=0)
    expected = tiny_of(OnDicts)
    lq.fold_batchnorm(expected)
    lq.attach(expected, 8, 8, first_last=None, structure=lq.inspect(expected, dataset(2).tensors[0]))
    lq.calibrate(expected, [dataset(16).tensors[0][:8], dataset(16).tensors[0][8:]])
    assert_same(steps(module), steps(expected))


def reference_ranges(module):
    lq.fold_batchnorm(module)
    lq.attach(module, 8, 8)
    lq.calibrate(module, [dataset(16).tensors[0]])
    return steps(module)


def test_forward_argument_runs_such_a_batch():
    module, given = tiny_of(OnDicts), []

    def forward(model, batch):
        given.append(model)
        return model(batch["image"])

    fit(module, [Quantize(forward=forward)], DataLoader(Images(), batch_size=8), max_epochs=0)
    assert len(given) > 2 and set(given) == {module}  # to look, and on two batches of 8 to calibrate
    assert_same(steps(module), reference_ranges(tiny()))


def test_calibration_step_of_the_module():
    module = tiny_of(WithCalibrationStep)
    fit(module, [Quantize()], DataLoader(Images(), batch_size=8), max_epochs=0)
    assert module.calibrated_on == (8, 1, 6, 6)
    assert_same(steps(module), reference_ranges(tiny()))


def test_forward_argument_wins_over_calibration_step():
    module = tiny_of(WithCalibrationStep)
    quantize = Quantize(forward=lambda model, batch: model(batch["image"]))
    fit(module, [quantize], DataLoader(Images(), batch_size=8), max_epochs=0)
    assert not hasattr(module, "calibrated_on")


def test_module_without_forward():
    class NoForward(Tiny):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module, usual = tiny_of(NoForward), tiny()
    fit(module, [Quantize(4, 4)], max_epochs=0)
    fit(usual, [Quantize(4, 4)], max_epochs=0)
    assert_same(steps(module), steps(usual))


def tiny_of(kind):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_is_an_error_at_once(samples):
    with pytest.raises(lq.SpecError, match="calibration needs at least 1"):
        Quantize(calibration_samples=samples)


@pytest.mark.parametrize("bits", [9, 3.5, "4"])
def test_wrong_width_is_an_error_at_once(bits):
    with pytest.raises(lq.SpecError, match="use an integer from 0 to 8, or 16"):
        Quantize(weights=bits)


def test_wrong_pattern_names_near_misses():
    with pytest.raises(lq.PatternError, match="did you mean 'net.3'"):
        fit(tiny(), [Quantize(exclude="net.33")])


@pytest.mark.filterwarnings("ignore:.*BatchNorms of Tiny were folded")
@pytest.mark.parametrize("extra", [[], [FineTune()]], ids=["ptq", "finetuned"])
@pytest.mark.parametrize("fold", [True, False])
def test_numbers_are_honest(tmp_path, fold, extra):
    module = tiny()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    made = trainer([Quantize(4, 4, fold_bn=fold), *extra, saver], enable_checkpointing=True)
    made.fit(module, loader(), loader(24))
    logged = made.validate(module, loader(24), verbose=False)
    loaded = load_from_checkpoint(Tiny, tmp_path / "last.ckpt")
    assert loaded is not module
    assert trainer().validate(loaded, loader(24), verbose=False) == logged
    assert made.callback_metrics["val_loss"] == logged[0]["val_loss"]
    x = dataset(8, seed=9).tensors[0]
    assert torch.equal(loaded.eval()(x), module.eval()(x))


# --- BatchNorms ---------------------------------------------------------------------------------------------------


def norms(module):
    return [name for name, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"max_epochs": 0}, 0), ({"max_steps": 0}, 0), ({"limit_train_batches": 1}, 2), ({"max_epochs": 2}, 2)],
    ids=str,
)
def test_batchnorms_are_folded_when_nothing_trains(options, kept):
    module = tiny()
    fit(module, [Quantize(4, 4)], **options)
    assert len(norms(module)) == kept


def test_training_at_few_bits_without_batchnorms_is_a_warning():
    with pytest.warns(UserWarning, match=r"2 BatchNorms of Tiny were folded.*fold_bn='auto'") as caught:
        fit(tiny(), [Quantize(2, 2, fold_bn=True), FineTune()])
    assert not any(isinstance(one.message, lq.NoEffectWarning) for one in caught)
    fit(tiny(), [Quantize(8, 8, fold_bn=True), FineTune()])  # at 8 bits nothing is lost


def test_unknown_folding():
    with pytest.raises(lq.SpecError, match=r"fold_bn='always' is unknown; use True, False or 'auto'"):
        Quantize(fold_bn="always")


@pytest.fixture(scope="module", params=["folded", "kept"])
def written(request, tmp_path_factory):
    """A quantized module, the path of its checkpoint, and how many BatchNorms it has."""
    module, path = tiny(), tmp_path_factory.mktemp("written") / "last.ckpt"
    extra, epochs, count = {"folded": ([], 0, 0), "kept": ([FineTune()], 1, 2)}[request.param]
    fit(module, [Quantize(4, 4), *extra], max_epochs=epochs).save_checkpoint(path)
    assert len(norms(module)) == count
    return module, path, count


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("fold", [True, False, "auto"])
def test_the_checkpoint_says_what_is_folded(written, fold, stage):
    module, path, count = written
    fresh = tiny(3)
    getattr(trainer([Quantize(4, 4, fold_bn=fold)]), stage)(fresh, loader(), ckpt_path=path)
    assert len(norms(fresh)) == count
    x = dataset(8, seed=9).tensors[0]
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    assert "on_load_checkpoint" not in vars(fresh)


@pytest.mark.parametrize("fold", [True, False, "auto"])
def test_a_resumed_run_goes_on_as_its_checkpoint_is_folded(tmp_path, fold):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(tiny(), [Quantize(4, 4), FineTune(), saver], enable_checkpointing=True)
    module = tiny(3)
    fit(module, [Quantize(4, 4, fold_bn=fold), FineTune()], max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert len(norms(module)) == 2
    assert {type(q.estimator).__name__ for q in quantizers(module)} == {"LSQ"}


def test_averages_of_a_module_that_the_checkpoint_has_otherwise(tmp_path):
    fit(tiny(), [Quantize(4, 4)], max_epochs=0).save_checkpoint(tmp_path / "last.ckpt")
    callbacks = [Quantize(4, 4), FineTune(), EMAWeightAveraging(decay=0.5)]
    with pytest.raises(
        lq.StateError, match=r"folded otherwise.*EMAWeightAveraging has copied.*give Quantize the fold_bn"
    ):
        fit(tiny(), callbacks, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")


class Pair(Tiny):
    """Two networks, of which forward calls one."""

    def __init__(self):
        super().__init__()
        self.other = tiny(5).net

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - self.other(batch[0])).square().mean()


def test_networks_that_are_not_quantized_keep_their_batchnorms():
    module = tiny_of(Pair)
    fit(module, [Quantize(8, 8, exclude="net.0")], max_epochs=0)
    assert norms(module) == ["net.1", "other.1", "other.4"]


def test_batchnorms_that_are_left_are_named():
    module = tiny()
    module.net[0].register_forward_hook(lambda *args: None)
    with pytest.warns(lq.NoEffectWarning, match=r"1 BatchNorm stayed unfolded: net.1 behind net.0: net.0 has a hook"):
        fit(module, [Quantize(8, 8)], max_epochs=0)
    assert norms(module) == ["net.1"]


# --- before fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 1])
def test_validating_before_fit_changes_nothing(epochs):
    module, usual = tiny(), tiny()
    made = trainer([Quantize(4, 4)], max_epochs=epochs)
    before = made.validate(module, loader(), verbose=False)
    assert before == trainer().validate(tiny(), loader(), verbose=False)
    assert_same(dict(module.state_dict()), dict(usual.state_dict()))
    made.fit(module, loader())
    fit(usual, [Quantize(4, 4)], max_epochs=epochs)
    assert_same(dict(module.state_dict()), dict(usual.state_dict()))
    assert made.validate(module, loader(), verbose=False) != before


def test_weights_alone_are_evaluated_quantized_and_folded_at_fit():
    module, usual = tiny(), tiny()
    made = trainer([Quantize(4, None)], max_epochs=0)
    made.validate(module, loader(), verbose=False)
    assert is_attached(module) and len(norms(module)) == 2
    made.fit(module, loader())
    fit(usual, [Quantize(4, None)], max_epochs=0)
    assert_same(dict(module.state_dict()), dict(usual.state_dict()))


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_summaries_before_quantize(kind):
    module = tiny()
    module.example_input_array = torch.randn(2, 1, 6, 6)
    fit(module, [kind(), Quantize(4, 4)], max_epochs=0)
    assert all(q.calibrated for q in quantizers(module))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("extra", [[], [FineTune()]], ids=["ptq", "finetuned"])
def test_true_precisions(precision, extra):
    module = tiny()
    made = fit(module, [Quantize(4, 4), *extra], precision=precision, max_epochs=len(extra))
    assert {q.log2_step.dtype for q in quantizers(module)} == {torch.float32}
    assert made.validate(module, loader(), verbose=False)[0]["val_loss"] < 1.3


STAGES = {
    "finetune": (lambda: [Quantize(4, 4), FineTune()], 1),
    "reconstruct": (lambda: [Quantize(4, 4), Reconstruct(iterations=4)], 0),
    "noise": (lambda: [Quantize(8, 8), LearnNoiseScale(3, 3)], 2),
}


@pytest.mark.parametrize("stages", STAGES)
def test_double_as_default(stages):
    chain, epochs = STAGES[stages]
    x, y = dataset().tensors
    torch.set_default_dtype(torch.float64)
    try:
        module = tiny()
        fit(module, chain(), DataLoader(TensorDataset(x.double(), y), batch_size=8), max_epochs=epochs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.net[0].weight.dtype == torch.float64
    assert {t.dtype for q in quantizers(module) for t in (q.log2_step, q.zero_point, q.bits)} == {torch.float32}
