"""How a LightningModule is run on a batch: its forward where that fits, else what its training_step calls."""

from collections import namedtuple
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import AllocateBits, ExportModel, FineTune, Quantize, Reconstruct
from lq.callbacks.trainer.steps import quiet, run_step
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, steps, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

Named = namedtuple("Named", ["image", "label"])


@dataclass
class Fields:
    image: torch.Tensor
    label: torch.Tensor


def collated(kind):
    def collate(samples):
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return {dict: lambda: {"image": x, "label": y}, list: lambda: [x, y], torch.Tensor: lambda: x}.get(
            kind, lambda: kind(x, y)
        )()

    return DataLoader(dataset(), 8, collate_fn=collate)


def parts(batch):
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    if isinstance(batch, (tuple, list)):
        return batch
    return (batch, None) if isinstance(batch, torch.Tensor) else (batch.image, batch.label)


class ByStep(Tiny):
    """Only its training_step knows what of a batch is the image."""

    def training_step(self, batch, batch_idx):
        x, y = parts(batch)
        self.log("loss", 1.0)
        output = self(x)
        return output.square().mean() if y is None else F.cross_entropy(output, y)


class NoForward(pl.LightningModule):
    """Parts that its training_step calls one after the other."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.decoder = nn.Conv2d(4, 1, 3, padding=1)
        self.noise = nn.Dropout(0.5)

    def training_step(self, batch):
        x, _ = parts(batch)
        return F.mse_loss(self.decoder(self.noise(self.encoder(x))), x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def made(kind):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind", [dict, list, Named, Fields, torch.Tensor])
@pytest.mark.parametrize("module", [ByStep, NoForward])
def test_every_kind_of_batch(module, kind):
    """Ranges are those of the module attached and calibrated by hand on the images."""
    found = made(module)
    fit(found, [Quantize(8, 8, fold_bn=False, calibration_samples=32)], collated(kind), max_epochs=0)
    expected = made(module)

    def forward(model, x):
        return model(x) if module is ByStep else model.decoder(model.encoder(x))

    images = dataset().tensors[0]
    lq.attach(expected, 8, 8, structure=lq.inspect(expected, images[:2], forward=forward))
    lq.calibrate(expected, images.split(8), forward=forward)
    assert [q.name for q in quantizers(found)] == [q.name for q in quantizers(expected)]
    assert_same(steps(found), steps(expected))


def test_names_of_forwards_parameters_come_first():
    class Named(ByStep):
        def forward(self, image):
            return self.net(image)

        def training_step(self, batch, batch_idx):
            assert self.trainer.sanity_checking is False and self._fabric is None
            raise AssertionError("the forward takes the batch")

    fit(made(Named), [Quantize(8, 8)], collated(dict), max_epochs=0)


def test_a_step_leaves_no_trace():
    class Counting(ByStep):
        def __init__(self):
            super().__init__()
            self.accuracy = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            self.accuracy.update(batch["label"].float())
            self.log_dict({"a": self.accuracy})
            return super().training_step(batch, batch_idx) + 0 * torch.rand(())

    module, batch = made(Counting), next(iter(collated(dict)))
    module.accuracy.update(3.0)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    before = set(module.__dict__)
    assert run_step(module, batch).shape == (8, 3)
    assert module.accuracy.compute() == 3.0
    module.accuracy.update(5.0)
    assert module.accuracy.compute() == 4.0
    assert set(module.__dict__) == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()] == hooks
    states = []
    for callbacks in ([], [Quantize(8, 8, fold_bn=False)]):
        module = made(Counting)
        pl.seed_everything(1, verbose=False)
        fit(module, callbacks, collated(dict))
        states.append(torch.get_rng_state())
    assert_same(*states)


def test_a_teacher_that_the_step_calls_stays_as_it_is():
    class Distilled(NoForward):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Conv2d(1, 2, 3, padding=1).requires_grad_(False)

        def training_step(self, batch):
            x = batch["image"]
            found = self.decoder(self.encoder(x))
            return F.mse_loss(found, self.teacher(x).mean(1, keepdim=True))

    module = made(Distilled)
    table = AllocateBits(6.0, samples=16, sensitivity="output_distortion")
    fit(module, [Quantize(4, 8), table], collated(dict), max_epochs=0)
    assert {q.name.partition(".")[0] for q in quantizers(module)} == {"encoder", "decoder"}
    assert table.sensitivity_table["decoder.weight"].loss[1] > 0


def test_steps_that_cannot_be_run():
    class ByHand(ByStep):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with (
        pytest.warns(UserWarning, match="ByHand could not be looked at"),
        pytest.raises(lq.DataError, match=r"(?s)ByHand did not take a batch of dict\(image.*pass forward="),
    ):
        fit(made(ByHand), [Quantize(8, 8)], collated(dict), max_epochs=0)

    class CallsNothing(ByStep):
        def training_step(self, batch, batch_idx):
            return batch["image"].sum()

    with pytest.raises(
        lq.DataError, match=r"training_step of CallsNothing calls no module with weights; .*calibration_s"
    ):
        run_step(made(CallsNothing), next(iter(collated(dict))))


def test_quiet_gives_a_copy_a_trainer_for_a_while():
    module, run = made(ByStep), trainer()
    with quiet(module, run):
        assert module.trainer is run
        module.log("x", 1.0)
    assert module._trainer is None


@pytest.mark.filterwarnings("ignore::lq.errors.NoEffectWarning")
@pytest.mark.parametrize("module", [ByStep, NoForward])
def test_all_stages_on_dicts(module, tmp_path):
    pytest.importorskip("onnxruntime")
    found = made(module)
    stages = [
        Quantize(4, 8, skip=True),
        AllocateBits("8x", samples=16, activations=6),
        Reconstruct(iterations=3, samples=16, batch_size=8),
        FineTune(lr=0.01),
        ExportModel(tmp_path / "model.onnx", samples=16, part="net" if module is ByStep else "decoder"),
    ]
    fit(found, stages, collated(dict), max_epochs=1)
    assert stages[1].allocated is not None
    assert stages[2].reconstruction.units
    assert (tmp_path / "model.onnx").exists()
