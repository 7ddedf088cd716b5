"""Networks with other inputs, outputs and code than classifiers: attach, calibrate, train a step, detach."""

import pytest
import torch
import torchvision
from torchvision.models import detection, segmentation

import lq
from lq.attachment.sites import quantizers


def all_the_way(model, batches, forward, loss):
    """Take a model through; return the shares of work and of sites that were calibrated."""
    model.eval()
    lq.fold_batchnorm(model)
    folded = {key: value.clone() for key, value in model.state_dict().items()}
    structure = lq.inspect(model, batches[0], forward=forward)
    lq.attach(model, 8, 8, structure=structure, estimator="lsq")
    lq.calibrate(model, batches, forward=forward)
    calibrated = [q.calibrated for q in quantizers(model)]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    value = loss(model)
    value.backward()
    assert torch.isfinite(value)
    assert any(q.log2_step.grad is not None and q.log2_step.grad.abs().sum() > 0 for q in quantizers(model))
    optimizer.step()
    lq.detach(model.eval())
    after = model.state_dict()
    assert after.keys() == folded.keys()
    moved = [key for key in after if not torch.equal(after[key], folded[key])]
    assert moved
    return structure.share, sum(calibrated) / len(calibrated)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_faster_rcnn():
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 96)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])} for _ in images]
    share, calibrated = all_the_way(
        model, [images], lambda model, batch: model(batch), lambda model: sum(model(images, targets).values())
    )
    assert share > 0.99
    assert calibrated == 1


def test_deeplab():
    torch.manual_seed(0)
    model = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    x, y = torch.rand(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    share, calibrated = all_the_way(
        model,
        [x],
        lambda model, batch: model(batch),
        lambda model: torch.nn.functional.cross_entropy(model(x)["out"], y),
    )
    assert share > 0.99
    assert calibrated == 1


@pytest.mark.parametrize("name", ["swin_v2_t", "vit_b_32", "maxvit_t", "convnext_tiny", "regnet_y_400mf"])
def test_torchvision_classifiers(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    structure = lq.inspect(model, torch.rand(1, 3, 224, 224))
    assert structure.share >= 0.99
    assert all(operation.sites for operation in structure.operations if not operation.reason)
