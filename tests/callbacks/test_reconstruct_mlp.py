"""ReconstructMLP in a Trainer: before Quantize, into checkpoints and out of them again, and what it says."""

import logging

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.relu import MARK, relus_in
from lq.callbacks import Quantize, Reconstruct, ReconstructMLP, load_from_checkpoint
from lq.errors import DataError, NoEffectWarning, StateError
from tests.helpers import QUIET, assert_same, hooks, tiny, trainer
from tests.helpers import fit as fit_tiny
from tests.reconstruction.networks import Tokens, samples

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
NAMES = ["net.blocks.0.mlp.1", "net.blocks.1.mlp.1"]


class Classifier(pl.LightningModule):
    """A transformer of two blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Tokens()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data():
    x = samples((3, 8, 8), 32)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(32) % 3), batch_size=8)


def chain(**options):
    given = {"iterations": 60, "batch_size": 8, "lr": 3e-3, "samples": 32, **options}
    return [ReconstructMLP(**given), Quantize(4, 8, first_last=None, calibration_samples=32)]


def fit(module, callbacks, ckpt_path=None, **options):
    made = trainer(callbacks, **options)
    made.fit(module, data(), ckpt_path=ckpt_path)
    return made


def test_mlps_are_fitted_before_ranges_are_found(caplog):
    callbacks, module = [*chain(), Reconstruct(iterations=5, batch_size=8, samples=32)], Classifier()
    with caplog.at_level(logging.INFO):
        fit(module, callbacks, max_epochs=0)
    found = callbacks[0].reconstruction
    assert [one.name for one in found.mlps] == NAMES == relus_in(module)
    assert all(one.after < one.before for one in found.mlps)
    assert "ReconstructMLP: 2 GELUs of Classifier are ReLUs now; mean error of their MLPs" in caplog.text
    assert module.net.blocks[0].mlp[2].input_quantizer.zero_point == 0
    module.eval()
    with torch.no_grad():
        x = samples((3, 8, 8), 8, seed=5)
        quantized, whole = module(x), lq.detach(module)(x)
    assert (quantized - whole).square().mean() < 0.1 * whole.var()


def test_only_once(tmp_path):
    callbacks, module = chain(), Classifier()
    made = fit(module, callbacks, max_epochs=0)
    weight = module.net.blocks[0].mlp[0].parametrizations.weight.original.clone()
    made.fit(module, data())
    assert torch.equal(module.net.blocks[0].mlp[0].parametrizations.weight.original, weight)
    fit(module, chain(), max_epochs=0)
    assert torch.equal(module.net.blocks[0].mlp[0].parametrizations.weight.original, weight)


def test_nothing_of_it_stays_on_the_module():
    module, reference = Classifier(), Classifier()
    fit(module, chain(), max_epochs=0)
    fit(reference, chain()[1:], max_epochs=0)
    assert hooks(module) == hooks(reference)
    extra = set(module.state_dict()) - set(reference.state_dict())
    assert extra == {f"{name}.{MARK}" for name in NAMES}


@pytest.mark.parametrize("start", ["fit", "validate"])
def test_a_checkpoint_goes_on(start, tmp_path):
    module, callbacks = Classifier(), chain()
    made = fit(module, callbacks, max_epochs=1)
    made.save_checkpoint(tmp_path / "saved.ckpt")
    again, others = Classifier(), chain()
    if start == "fit":
        fit(again, others, tmp_path / "saved.ckpt", max_epochs=1)
        assert others[0].reconstruction == callbacks[0].reconstruction
    else:
        trainer(others).validate(again, data(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert relus_in(again) == NAMES
    assert_same(dict(again.state_dict()), dict(module.state_dict()))


def test_a_checkpoint_loads_without_the_callback(tmp_path):
    module = Classifier()
    fit(module, chain(), max_epochs=0).save_checkpoint(tmp_path / "saved.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "saved.ckpt")
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))
    by_quantize = Classifier()
    trainer(chain()[1:]).validate(by_quantize, data(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert relus_in(by_quantize) == NAMES


def test_a_plain_module_refuses_the_checkpoint(tmp_path):
    fit(Classifier(), chain(), max_epochs=0).save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(RuntimeError, match=MARK):
        Classifier.load_from_checkpoint(tmp_path / "saved.ckpt")


def test_a_checkpoint_from_before_is_refused(tmp_path):
    fit(Classifier(), chain()[1:], max_epochs=0).save_checkpoint(tmp_path / "saved.ckpt")
    module = Classifier()
    fit(module, chain(), max_epochs=0)
    with pytest.raises((DataError, RuntimeError), match="the checkpoint has a GELU at 'net.blocks.0.mlp.1'"):
        fit(module, chain(), tmp_path / "saved.ckpt", max_epochs=1)


def test_behind_quantize_it_is_refused():
    with pytest.raises(StateError, match=r"list ReconstructMLP before it in Trainer\(callbacks="):
        fit(Classifier(), chain()[::-1], max_epochs=0)


def test_nothing_to_do_is_told():
    with pytest.warns(
        NoEffectWarning, match="ReconstructMLP found no GELU between two linear layers in .*, and changed"
    ):
        fit_tiny(tiny(), [ReconstructMLP(iterations=2), Quantize()], max_epochs=0)


def test_it_runs_without_quantize():
    module, callback = Classifier(), chain()[0]
    fit(module, [callback], max_epochs=0)
    assert relus_in(module) == NAMES and isinstance(module.net.blocks[0].mlp[0], nn.Linear)
