"""Averages of a quantized module: whole widths, averaged weights and steps; EMA and stochastic weight averaging."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import Quantize, load_from_checkpoint
from tests.callbacks.training import PLAIN, STAGES, check_resume, learned, over, updates_of, weights
from tests.helpers import QUIET, Tiny, assert_same, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class States(pl.Callback):
    """Copies of all parameters, after every batch and at the start of every epoch."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.batches.append({**weights(pl_module), **learned(pl_module)})

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append({**weights(pl_module), **learned(pl_module)})


def ema(states, decay):
    """The exponential moving average of named tensors, from the first on."""
    average = {name: value.double() for name, value in states[0].items()}
    for state in states[1:]:
        average = {name: decay * average[name] + (1 - decay) * value.double() for name, value in state.items()}
    return {name: value.float() for name, value in average.items()}


def check_whole(module):
    """Widths are whole numbers and zero points multiples of a half, to the bit."""
    assert list(quantizers(module))
    for quantizer in quantizers(module):
        assert torch.equal(quantizer.bits, quantizer.bits.round())
        assert torch.equal(2 * quantizer.zero_point, (2 * quantizer.zero_point).round())


@over(STAGES)
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
def test_moving_average_after_quantize(stages, decay, tmp_path):
    module, saver = tiny(), ModelCheckpoint(tmp_path, save_last=True)
    made = trainer([*stages(), EMAWeightAveraging(decay=decay), saver], max_epochs=2, enable_checkpointing=True)
    made.fit(module, loader(), loader(24))
    check_whole(module)
    loaded = load_from_checkpoint(Tiny, tmp_path / "last.ckpt")
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))
    result = trainer().validate(loaded, loader(24), verbose=False)[0]
    assert result["val_loss"] == made.callback_metrics["val_loss"]  # it validated what it saved


@over(PLAIN)
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
def test_weights_and_steps_are_moving_averages(stages, decay):
    module, states = tiny(), States()
    fit(module, [*stages(), states, EMAWeightAveraging(decay=decay)], max_epochs=2)
    expected = ema(states.batches, decay)
    torch.testing.assert_close({**weights(module), **learned(module)}, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(expected[name], value) for name, value in states.batches[-1].items())


@over(STAGES)
def test_moving_average_resumes(stages, tmp_path):
    check_resume(tiny, lambda: [*stages(), EMAWeightAveraging(decay=0.5)], tmp_path)


def average(module, chain):
    """Train with Lightning's averaging of the last three of four epochs; all optimizer steps."""
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    with updates_of(module) as updates:
        fit(module, [*chain, averaging], max_epochs=4)
    return updates


@over(STAGES)
def test_stochastic_weight_averaging_keeps_widths_and_proportions(stages):
    module = tiny(norm=False)
    updates = average(module, stages())
    check_whole(module)
    own, users = ([update.rates[0] for update in updates if update.own is own] for own in (True, False))
    assert len(own) == len(users) == 16 and len(set(users)) > 1
    assert [rate / user for rate, user in zip(own, users, strict=True)] == pytest.approx([1e-3 / 0.05] * 16)


@over(PLAIN)
@pytest.mark.parametrize("norm", [True, False])
def test_weights_and_steps_are_stochastic_averages(stages, norm):
    module, states = tiny(norm=norm), States()
    average(module, [*stages(), states])
    taken = states.epochs[1:4]  # SWA averages what the epochs from the chosen one on begin with
    expected = {name: torch.stack([state[name] for state in taken]).mean(0) for name in taken[0]}
    # With BatchNorms, Lightning ends with an epoch for their statistics, and a step of the user's optimizer in it.
    found = learned(module) if norm else {**weights(module), **learned(module)}
    torch.testing.assert_close(found, {name: expected[name] for name in found}, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(expected[name], value) for name, value in states.epochs[-1].items())


@over(STAGES)
@pytest.mark.parametrize(
    "make",
    [WeightAveraging, EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.01)],
    ids=["average", "ema", "swa"],
)
def test_averaging_before_quantize_is_an_error(stages, make):
    with pytest.raises(lq.StateError, match="list Quantize before it in Trainer"):
        fit(tiny(), [make(), *stages()])


@pytest.mark.parametrize("bits", [3, 7])
def test_averages_of_widths_that_sums_round_stay_whole(bits, tmp_path):
    module, saver = tiny(), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    callbacks = [Quantize(bits, bits, first_last=None), EMAWeightAveraging(decay=0.9), saver]
    trainer(callbacks, max_epochs=5, enable_checkpointing=True).fit(module, loader(), loader(24))
    check_whole(module)
    for found in (module, load_from_checkpoint(Tiny, tmp_path / "last.ckpt")):
        check_whole(found)
        assert {float(b) for q in quantizers(found) for b in q.bits.flatten()} == {float(bits)}
        assert lq.integer_weights(found)
