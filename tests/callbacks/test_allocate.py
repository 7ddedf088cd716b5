import json
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lq
from lq.attachment.sites import activation_quantizers, float_weight, quantizers, weight_quantizer
from lq.callbacks import AllocateBits, FineTune, Quantize
from lq.errors import BudgetError, SpecError, StateError
from lq.sensitivity import Fisher, Metric, OutputDistortion, measure_sensitivity
from lq.sensitivity.metric import Loss
from tests.helpers import QUIET, Tiny, fit, loader, most_values_over_limit, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def widths(module):
    return {q.name: q.bits.tolist() for q in quantizers(module)}


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("solver", ["greedy", "lagrangian", "exact"])
def test_widths_are_within_the_budget_and_in_the_model(granularity, solver):
    module, callback = tiny(), AllocateBits("8x", solver=solver, granularity=granularity)
    fit(module, [Quantize(8, 8), callback], max_epochs=0)
    assert lq.summary(module).average_bits <= 4.0
    assert most_values_over_limit(module.eval()) <= 1
    for layer, bits in callback.allocated.weights.items():
        assert weight_quantizer(module.get_submodule(layer)).bits.unique().tolist() == sorted(
            {*np.ravel(bits).tolist()}
        )
    assert all(q.calibrated for q in quantizers(module))


def test_it_is_what_the_functions_find():
    module, callback = tiny(), AllocateBits("8x", "fisher", samples=32)
    fit(module, [Quantize(8, 8), callback], max_epochs=0)
    again = tiny()
    fit(again, [Quantize(8, 8)], max_epochs=0)
    table = measure_sensitivity(again, loader(), "fisher", activations=False)
    found = lq.allocate(again, table, "8x")
    assert callback.allocated == found
    assert callback.sensitivity_table.to_json() == table.to_json()


def test_cross_terms_are_those_of_the_functions():
    module, callback = tiny(), AllocateBits("8x", "model_fisher", granularity="channel", samples=32, cross_terms=True)
    fit(module, [Quantize(8, 8), callback], max_epochs=0)
    again = tiny()
    fit(again, [Quantize(8, 8)], max_epochs=0)
    table = measure_sensitivity(again, loader(), "model_fisher", activations=False, cross_terms=True)
    assert callback.allocated == lq.allocate(again, table, "8x", granularity="channel", cross_terms=True)
    assert lq.summary(module).average_bits <= 4.0


def test_activations_get_a_budget_and_new_ranges():
    module = tiny()
    fit(module, [Quantize(8, 8), AllocateBits("8x", activations=4.0)], max_epochs=0)
    found = {name: int(q.bits) for name, q in activation_quantizers(module).items()}
    assert min(found.values()) <= 4
    fresh = tiny()
    fit(fresh, [Quantize(8, 8)], max_epochs=0)
    lq.set_bits(fresh, {name: q.bits.int().tolist() for name, q in weights(module).items()}, found)
    lq.calibrate(fresh, loader())
    for a, b in zip(quantizers(module), quantizers(fresh), strict=True):
        assert torch.equal(a.log2_step, b.log2_step)


def weights(module):
    return {n: q for n, m in module.named_modules() if (q := weight_quantizer(m)) is not None}


def test_training_goes_on_with_the_widths():
    module = tiny()
    fit(module, [Quantize(8, 8), AllocateBits(3.0), FineTune()], max_epochs=3)
    assert lq.summary(module).average_bits <= 3.0
    assert most_values_over_limit(module.eval()) <= 1


def test_a_resumed_run_measures_nothing(tmp_path):
    first = tiny()
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(
        first,
        [Quantize(8, 8), AllocateBits("8x"), FineTune(), saving],
        root=tmp_path,
        max_epochs=1,
        enable_checkpointing=True,
    )
    again, callback = tiny(seed=5), AllocateBits("8x")
    fit(
        again,
        [Quantize(8, 8), callback, FineTune()],
        max_epochs=2,
        ckpt_path=tmp_path / "last.ckpt",
        enable_checkpointing=False,
    )
    assert callback.sensitivity_table is None
    assert callback.allocated is not None
    assert widths(again) == widths(first)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = lq.load(checkpoint, tiny(seed=7))
    assert widths(loaded) == widths(first)


@pytest.mark.filterwarnings("ignore:.*BatchNorms of Tiny were folded")  # by the first of two fits
def test_the_callback_allocates_for_each_module_once():
    callback = AllocateBits("8x")
    first, second = tiny(), tiny(seed=3)
    fit(first, [Quantize(8, 8), callback], max_epochs=0)
    table = callback.sensitivity_table
    fit(first, [Quantize(8, 8), callback], max_epochs=1)
    assert callback.sensitivity_table is table
    fit(second, [Quantize(8, 8), callback], max_epochs=0)
    assert callback.sensitivity_table is not table
    assert callback.allocated.is_in(second)
    lq.set_bits(second, {"net.8": 1})
    assert not callback.allocated.is_in(second)


def test_activations_of_a_checkpoint_without_allocation(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(tiny(), [Quantize(8, 8), saving], root=tmp_path, enable_checkpointing=True)
    module = tiny(seed=5)
    callbacks = [Quantize(8, 8), AllocateBits("8x", activations=4.0)]
    fit(module, callbacks, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert lq.summary(module).average_bits <= 4.0
    assert {int(q.bits) for q in activation_quantizers(module).values()} != {8}


def test_a_saved_allocation_is_taken(tmp_path):
    first = tiny()
    path = tmp_path / "deep" / "bits.json"
    fit(first, [Quantize(8, 8), AllocateBits("8x", granularity="channel", save_to=path)], max_epochs=0)
    assert set(json.loads(path.read_text())["weights"]) == {"net.0", "net.3", "net.8"}
    assert [p.name for p in path.parent.iterdir()] == ["bits.json"]
    second, callback = tiny(), AllocateBits(allocation=str(path))
    fit(second, [Quantize(8, 8), callback], max_epochs=0)
    assert callback.sensitivity_table is None
    assert widths(second) == widths(first)
    for a, b in zip(quantizers(first), quantizers(second), strict=True):
        assert torch.equal(a.log2_step, b.log2_step)


def test_the_log_folder_gets_the_allocation_and_loggers_its_numbers(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    module = tiny()
    fit(module, [Quantize(8, 8), AllocateBits("8x")], max_epochs=1, logger=logger)
    saved = lq.Allocation.load(tmp_path / "run" / "version_0" / "allocation.json")
    assert set(saved.weights) == {"net.0", "net.3", "net.8"}
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "allocation/average_bits" in text and "allocation/bytes" in text


def test_nothing_is_written_where_the_trainer_keeps_nothing(tmp_path):
    fit(tiny(), [Quantize(8, 8), AllocateBits("8x")], max_epochs=0, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


class Regression(Tiny):
    """Targets are floats; the loss is known to training_step alone, which logs."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.smooth_l1_loss(self(x), F.one_hot(y, 3).float())
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        return {"loss": loss}


class Unlabelled(Regression):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"image": batch[0], "y": batch[1]}

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["y"]), batch_idx)


def test_the_loss_of_training_step_where_batches_have_no_classes():
    torch.manual_seed(0)
    module = Unlabelled()
    callback = AllocateBits("8x", forward=lambda module, batch: module(batch["image"]))
    fit(module, [Quantize(8, 8, forward=lambda module, batch: module(batch["image"])), callback], max_epochs=1)
    assert callback.allocated.metric == "Fisher"
    assert "log" not in vars(module)


@dataclass(frozen=True)
class Copied(Metric):
    """A metric that nobody else knows: Fisher, with a loss of its own."""

    loss: Loss | None = None

    def measure(self, model, tensors, batches, reading):
        return Fisher(loss=self.loss).measure(model, tensors, batches, reading)


class Duck:
    """A metric by what it does alone."""

    def measure(self, model, tensors, batches, reading):
        return OutputDistortion().measure(model, tensors, batches, reading)


def test_metrics_that_only_measure():
    module, callback = tiny(), AllocateBits("8x", Duck())
    fit(module, [Quantize(8, 8), callback], max_epochs=0)
    assert callback.allocated.metric == "Duck"


@pytest.mark.parametrize("metric", ["fisher", Copied()], ids=str)
def test_the_loss_of_calibration_loss(metric):
    class Own(Tiny):
        def calibration_loss(self, batch):
            return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())

    torch.manual_seed(0)
    module, callback = Own(), AllocateBits("8x", metric)
    fit(module, [Quantize(8, 8), callback], max_epochs=0)
    again = tiny()
    fit(again, [Quantize(8, 8)], max_epochs=0)
    own = Fisher(loss=lambda m, batch: F.mse_loss(m(batch[0]), F.one_hot(batch[1], 3).float()))
    expected = measure_sensitivity(again, loader(), own, activations=False)
    np.testing.assert_allclose(
        callback.sensitivity_table["net.3.weight"].loss, expected["net.3.weight"].loss, rtol=1e-4
    )


@pytest.mark.parametrize("metric", ["model_fisher", "output_distortion", "hawq_v2", "kl"])
def test_every_metric(metric):
    module = tiny()
    fit(module, [Quantize(8, 8), AllocateBits("8x", metric, samples=16)], max_epochs=0)
    assert lq.summary(module).average_bits <= 4.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(precision):
    module = tiny()
    fit(module, [Quantize(8, 8), AllocateBits("8x"), FineTune()], max_epochs=1, precision=precision)
    assert lq.summary(module).average_bits <= 4.0


def test_errors():
    with pytest.raises(SpecError, match="budget='8y' is not understood"):
        AllocateBits("8y")
    with pytest.raises(SpecError, match="sensitivity='fischer' is unknown"):
        AllocateBits("8x", "fischer")
    with pytest.raises(SpecError, match="solver='magic' is unknown"):
        AllocateBits("8x", solver="magic")
    with pytest.raises(SpecError, match="samples=0; sensitivity needs at least 1"):
        AllocateBits("8x", samples=0)
    with pytest.raises(StateError, match="AllocateBits needs a model with quantizers"):
        fit(tiny(), [AllocateBits("8x")], max_epochs=0)
    with pytest.raises(StateError, match="AllocateBits needs calibrated quantizers; list Quantize before it"):
        fit(tiny(), [AllocateBits("8x"), Quantize()], max_epochs=0)
    module = tiny()
    with pytest.raises(BudgetError, match="the budget of 100x cannot be met"):
        fit(module, [Quantize(8, 8), AllocateBits("100x")], max_epochs=0)
    assert {tuple(q.bits.unique().tolist()) for q in quantizers(module)} == {(8.0,)}


def test_a_better_allocation_than_uniform_after_training():
    """The loop closes: at equal stored bytes the allocated network fits its data better than the uniform one."""
    losses = {}
    for name, callbacks in {
        "uniform": [Quantize(2, 8, first_last=None, fold_bn=False), FineTune()],
        "allocated": [Quantize(2, 8, first_last=None, fold_bn=False), AllocateBits(2.0, "model_fisher"), FineTune()],
    }.items():
        pl.seed_everything(0, verbose=False)
        module = tiny()
        fit(module, callbacks, max_epochs=4)
        module.eval()
        with torch.no_grad():
            losses[name] = sum(float(F.cross_entropy(module(x), y)) for x, y in loader())
        assert float_weight(module.net[0]).shape == (4, 1, 3, 3)
    assert losses["allocated"] <= losses["uniform"]


def test_the_budget_that_the_model_has():
    """ "same" is the bytes of the widths that `Quantize` gave, and widths within it differ by channel."""
    module = tiny()
    fit(module, [Quantize(4, 4)], max_epochs=0)
    allowed = lq.summary(module).bytes
    other, stage = tiny(), AllocateBits("same", granularity="channel", samples=16)
    fit(other, [Quantize(4, 4), stage], max_epochs=0)
    assert lq.summary(other).bytes <= allowed and stage.allocated.costs.keys() == {f"{allowed} bytes"}
