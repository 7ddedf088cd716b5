"""How Quantize learns what there is to quantize: from data, an example, a saved structure, a checkpoint."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import FineTune, Quantize, load_from_checkpoint
from tests.helpers import assert_same, fit, steps, trainer
from tests.models import Block


class Classifier(pl.LightningModule):
    """A transformer block with a head."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Block(), nn.Flatten(), nn.Linear(40, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Late(Classifier):
    """Builds its network in configure_model."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(Block(), nn.Flatten(), nn.Linear(40, 3))


class BuiltInSetup(Classifier):
    """Builds its network in its own setup."""

    def __init__(self):
        pl.LightningModule.__init__(self)

    def setup(self, stage):
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = nn.Sequential(Block(), nn.Flatten(), nn.Linear(40, 3))


def data(**options):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(16, 5, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)),
        batch_size=8,
        **options,
    )


def classifier(kind=Classifier):
    torch.manual_seed(0)
    return kind()


def sites(module):
    return [q.name for q in quantizers(module)]


PRODUCTS = {f"net.0.attn.matmul_{i}_{side}" for i in (0, 1) for side in ("left", "right")}


def test_a_batch_of_the_trainers_data():
    module = classifier()
    fit(module, [Quantize(8, 8)], data(), max_epochs=0)
    assert set(sites(module)) >= PRODUCTS
    assert all(q.calibrated for q in quantizers(module))


@pytest.mark.parametrize("kind", [Classifier, Late, BuiltInSetup])
def test_layers_may_be_built_late(kind):
    module, reference = classifier(kind), classifier()
    fit(module, [Quantize(8, 8)], data(), max_epochs=0)
    fit(reference, [Quantize(8, 8)], data(), max_epochs=0)
    assert sites(module) == sites(reference)
    assert_same(steps(module), steps(reference))
    assert "configure_model" not in vars(module)


def test_the_example_input_array():
    module = classifier()
    module.example_input_array = torch.randn(2, 5, 8)
    trainer_ = trainer([quantize := Quantize(8, 8)])
    quantize.setup(trainer_, module, "fit")
    assert set(sites(module)) >= PRODUCTS


@pytest.mark.parametrize("inside", [True, False])
def test_a_saved_structure(inside, tmp_path):
    module, reference = classifier(), classifier()
    structure = lq.inspect(reference.net if inside else reference, torch.randn(2, 5, 8))
    (tmp_path / "structure.json").write_text(structure.to_json())
    quantize = Quantize(8, 8, structure=str(tmp_path / "structure.json"))
    quantize.setup(trainer([quantize]), module, "fit")
    fit(reference, [Quantize(8, 8)], data(), max_epochs=0)
    assert sites(module) == sites(reference)


@pytest.mark.parametrize("kind", [Classifier, Late, BuiltInSetup])
def test_a_checkpoint_brings_its_sites(kind, tmp_path):
    module = classifier(kind)
    made = fit(module, [Quantize(8, 8, skip=True)], data(), max_epochs=0)
    made.save_checkpoint(tmp_path / "saved.ckpt")
    x = torch.randn(4, 5, 8)
    expected = module.eval()(x)
    if kind is Classifier:
        loaded = load_from_checkpoint(kind, tmp_path / "saved.ckpt").eval()
        assert torch.equal(loaded(x), expected)
        assert sites(loaded) == sites(module)
    tested = classifier(kind)
    trainer([Quantize(8, 8, skip=True)]).test(tested, data(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert torch.equal(tested.eval()(x), expected)


def test_restored_sites_need_no_data(tmp_path):
    module = classifier()
    fit(module, [Quantize(8, 8)], data(), max_epochs=0).save_checkpoint(tmp_path / "saved.ckpt")
    fresh = classifier()
    quantize = Quantize(8, 8)
    quantize.setup(trainer([quantize]), fresh, "test")
    assert not PRODUCTS & set(sites(fresh))
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    x = torch.randn(4, 5, 8)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_training_moves_the_steps_of_attention_and_resumes(tmp_path):
    whole, first, second = (classifier() for _ in range(3))

    def callbacks():
        return [Quantize(4, 4, skip=True), FineTune("lsq")]

    fit(whole, callbacks(), data(), max_epochs=2)
    fit(first, callbacks(), data(), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, callbacks(), data(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_same(steps(second), steps(whole))
    before = classifier()
    fit(before, [Quantize(4, 4, skip=True)], data(), max_epochs=0)
    pairs = zip(quantizers(whole), quantizers(before), strict=True)
    moved = {now.name for now, then in pairs if not torch.equal(now.step, then.step)}
    assert moved >= PRODUCTS


def test_reading_a_batch_leaves_no_trace():
    states = []
    for with_it in (False, True):
        generator = torch.Generator().manual_seed(3)
        module = classifier()
        pl.seed_everything(1, verbose=False)
        loader = data(shuffle=True, generator=generator)
        fit(module, [Quantize(8, 8)] if with_it else [], loader, max_epochs=1)
        states.append((torch.get_rng_state(), generator.get_state()))
    assert_same(states[0], states[1])
