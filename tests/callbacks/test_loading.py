"""Quantized checkpoints: without a Trainer, through Trainer.test, and from float training."""

import pytest
import torch

import lq
from lq.attachment.sites import is_attached
from lq.callbacks import FineTune, Quantize, load_from_checkpoint
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, steps, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture
def saved(tmp_path):
    """A fine-tuned module and its checkpoint."""
    module = tiny(lr=0.01)
    made = fit(module, [Quantize(3, 4), FineTune()])
    made.save_checkpoint(tmp_path / "quantized.ckpt")
    return module.eval(), tmp_path / "quantized.ckpt"


def test_round_trip_is_bit_identical(saved):
    module, path = saved
    loaded = load_from_checkpoint(Tiny, path)
    assert type(loaded) is Tiny
    assert loaded.hparams == module.hparams
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))
    x = dataset(8, seed=9).tensors[0]
    assert torch.equal(loaded.eval()(x), module(x))
    lq.detach(module)
    assert not torch.equal(loaded(x), module(x))


def test_arguments_reach_lightning(saved):
    assert load_from_checkpoint(Tiny, saved[1], lr=0.5, map_location="cpu").hparams.lr == 0.5


def test_on_load_checkpoint_of_the_module_still_runs(saved):
    class Listening(Tiny):
        def on_load_checkpoint(self, checkpoint):
            self.epoch = checkpoint["epoch"]

    assert load_from_checkpoint(Listening, saved[1]).epoch >= 0


def test_float_checkpoint_is_an_error(tmp_path):
    made = fit(tiny(), [])
    made.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(lq.DataError, match=r"it is a float one; use model.load_state_dict"):
        load_from_checkpoint(Tiny, tmp_path / "float.ckpt")


def test_other_module_is_an_error(saved):
    class Other(Tiny):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.net = self.net[:3]

    with pytest.raises(lq.DataError, match="build the model the checkpoint was saved from"):
        load_from_checkpoint(Other, saved[1])


@pytest.mark.parametrize("seed", [0, 3])
def test_trainer_tests_a_quantized_checkpoint(saved, seed):
    module, path = saved
    fresh = tiny(seed)
    result = trainer([Quantize(3, 4)]).test(fresh, loader(), ckpt_path=path, verbose=False)
    assert result == trainer().test(module, loader(), verbose=False)
    assert_same(steps(fresh), steps(module))


@pytest.mark.parametrize("fold", [True, False])
def test_trainer_tests_a_float_checkpoint_quantized(tmp_path, fold):
    module = tiny()
    fit(module, []).save_checkpoint(tmp_path / "float.ckpt")
    fresh = tiny(3)
    result = trainer([Quantize(4, None, fold_bn=fold)]).test(
        fresh, loader(), ckpt_path=tmp_path / "float.ckpt", verbose=False
    )
    assert is_attached(fresh)
    if fold:
        lq.fold_batchnorm(module)
    lq.attach(module, 4, None)
    assert trainer().test(module, loader(), verbose=False) == result


def test_quantizing_starts_from_a_float_checkpoint(tmp_path):
    module = tiny()
    fit(module, []).save_checkpoint(tmp_path / "float.ckpt")
    by_weights = Tiny.load_from_checkpoint(tmp_path / "float.ckpt")
    assert_same(dict(by_weights.state_dict()), dict(module.state_dict()))
    fit(by_weights, [Quantize(4, 4)], max_epochs=0)
    fit(module, [Quantize(4, 4)], max_epochs=0)
    assert_same(dict(by_weights.state_dict()), dict(module.state_dict()))
