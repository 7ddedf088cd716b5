"""The LightningModule around timm: what it builds, logs and restores."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import lq
from lq.attachment.sites import is_attached
from lq.callbacks import Quantize
from lq.cli.data import DigitsData
from lq.cli.timm_module import TimmClassifier, data_config_of, load_weights
from lq.errors import DataError
from tests.cli.running import SILENT
from tests.helpers import assert_same, trainer

pytestmark = SILENT


def made(seed=0, **options):
    torch.manual_seed(seed)
    return TimmClassifier("test_resnet", **{"num_classes": 10, **options})


def data():
    return DigitsData(batch_size=16, image_size=16)


def short(callbacks=(), **options):
    limits = {"limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 2, "limit_predict_batches": 1}
    return trainer(callbacks, **{**limits, **options})


def test_it_is_timms_model():
    module, own = made(), timm.create_model("test_resnet", num_classes=10)
    assert_same(list(module.model.state_dict()), list(own.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module.eval()(x), module.model(x))
    assert made(num_classes=None).num_classes == 1000


def test_what_it_measures():
    module = made().eval()
    run, images = short(), data()
    (found,) = run.validate(module, images, verbose=False)
    (tested,) = run.test(module, images, verbose=False)
    predicted = torch.cat(run.predict(module, images))
    batches = [batch for batch, _ in zip(images.val_dataloader(), range(2), strict=False)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = module.eval()(x)
    assert (
        found["val_accuracy"] == tested["test_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    )
    assert found["val_loss"] == tested["test_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert torch.allclose(predicted, logits[:16].softmax(1), atol=1e-6)


def test_it_learns():
    module = made()
    run = short(max_epochs=3, limit_train_batches=1.0, limit_val_batches=1.0)
    run.fit(module, DigitsData(batch_size=32, image_size=16))
    assert run.callback_metrics["val_accuracy"] > 0.5
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the cosine has ended


def test_optimizer_and_schedule_as_they_are_given():
    module = made(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    )
    run = short(max_epochs=2)
    run.fit(module, data())
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_smoothed_labels():
    module, images = made(label_smoothing=0.1), torch.randn(4, 3, 16, 16)
    module.log = lambda *args, **kwargs: None
    labels = torch.tensor([0, 1, 2, 3])
    module.eval()
    assert torch.equal(
        module.training_step((images, labels), 0), F.cross_entropy(module(images), labels, label_smoothing=0.1)
    )


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_what_images_it_takes(in_chans):
    config = made(model_args={"in_chans": in_chans}).data_config
    assert config["input_size"] == (in_chans, 160, 160) and len(config["mean"]) == len(config["std"]) == in_chans
    assert data_config_of(torch.nn.Linear(2, 2)) == {}


# --- weights and checkpoints ------------------------------------------------------------------------------------------


def test_weights_of_files(tmp_path):
    source = made(1)
    torch.save(source.model.state_dict(), tmp_path / "plain.pth")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "module.ckpt")
    save_file(source.model.state_dict(), tmp_path / "plain.safetensors")
    for name in ("plain.pth", "module.ckpt", "plain.safetensors"):
        assert_same(made(2, checkpoint=tmp_path / name).model.state_dict(), source.model.state_dict())


def test_weights_of_a_quantized_model(tmp_path):
    source = made(1)
    lq.attach(source.model, 4, 8)
    lq.calibrate(source.model, [torch.randn(4, 3, 32, 32)])
    torch.save(source.model.state_dict(), tmp_path / "m.pth")
    lq.save(source.model, tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 32, 32)
    for name in ("m.pth", "m.safetensors"):
        assert torch.allclose(made(2, checkpoint=tmp_path / name).eval()(x), source.eval()(x), atol=1e-5)


def test_a_quantized_checkpoint_restores_without_callbacks(tmp_path):
    module = made()
    run = short([Quantize(4, 8)], max_epochs=0, root=tmp_path, enable_checkpointing=True)
    run.fit(module, data())
    (path,) = tmp_path.rglob("*.ckpt")
    other = made(3)
    short().validate(other, data(), ckpt_path=path, verbose=False)
    assert is_attached(other)
    assert_same(other.state_dict(), module.state_dict())
    assert_same(TimmClassifier.load_from_checkpoint(path).state_dict(), module.state_dict())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt18", {}, "timm cannot make 'resnt18', num_classes=10: Unknown model .*; did you mean resnet18"),
        (
            "test_resnet",
            {"model_args": {"depth": 3}},
            "timm cannot make 'test_resnet', num_classes=10, depth=3: .*depth",
        ),
        ("test_resnet", {"num_classes": 0}, "test_resnet has 0 classes; a classifier needs num_classes of 2 or more"),
        ("test_resnet", {"checkpoint": "nowhere.pth"}, "there is no file nowhere.pth"),
    ],
)
def test_wrong_models(name, options, message):
    with pytest.raises(DataError, match=message) as raised:
        TimmClassifier(name, **{"num_classes": 10, **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["another model", "other classes", "garbage", "a quantized one of another model"])
def test_checkpoints_of_other_models(kind, tmp_path):
    other = timm.create_model("test_vit" if "another" in kind else "test_resnet", num_classes=7)
    if "quantized" in kind:
        lq.calibrate(lq.attach(other, 4, None))
    path = tmp_path / "other.pth"
    torch.save(other.state_dict(), path)
    if kind == "garbage":
        path.write_bytes(b"garbage" * 20)
    model = made().model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = "is no checkpoint" if kind == "garbage" else r"other.pth: .*is not of this ResNet: "
    with pytest.raises(DataError, match=message) as raised:
        load_weights(model, path)
    assert "\n" not in str(raised.value)
    assert_same(model.state_dict(), before)


def test_a_run_from_a_checkpoint_of_another_model(tmp_path):
    run = short(max_epochs=1, root=tmp_path, enable_checkpointing=True)
    run.fit(TimmClassifier("test_vit", num_classes=10), DigitsData(image_size=160, batch_size=2))
    (path,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(DataError, match="the checkpoint is not of this TimmClassifier: it has no model.conv1.0.weight"):
        short().validate(made(), data(), ckpt_path=path, verbose=False)


def test_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(
        DataError, match=r"'test_resnet', .*, pretrained: no route to host; without a network give weights"
    ):
        made(pretrained=True)
