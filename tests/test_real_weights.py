"""Post-training quantization of real pretrained networks on real images; the data's folder is in LQ_DATA."""

import importlib.util
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lq
from lq.allocation.allocate import Granularity

DATA = os.environ.get("LQ_DATA")
pytestmark = [
    pytest.mark.skipif(DATA is None, reason="LQ_DATA is not set: checks on real weights and images are skipped"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def reader() -> Any:
    """The reader that comes with the data."""
    spec = importlib.util.spec_from_file_location("pack", Path(str(DATA)) / "pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str) -> tuple[nn.Module, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """A pretrained network, 512 calibration images and 1 000 labelled ones, in batches."""
    pack = reader()
    net, card = pack.load_model(name)
    if name.startswith("cifar10"):
        images, labels = pack.cifar10("test")
        test = list(zip(pack.cifar_tensor(images, card).split(100), torch.tensor(labels).split(100), strict=True))
        return net, list(pack.cifar_tensor(pack.cifar10("train")[0][:512], card).split(64)), test
    calibration = [images for images, _ in DataLoader(pack.ImageSet("calib_ilsvrc_train", card), 32)]
    return net, calibration, list(DataLoader(pack.ImageSet("val_nips17_ccby", card), 50))


def top1(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    return float(reader().top1(net, batches))


def losses(name: str, runs: list[tuple[int, int, bool]]) -> list[float]:
    """Points of top-1 lost at widths of weights and activations (attention included), with or without skip paths."""
    net, calibration, test = load(name)
    before = top1(net, test)
    lost = []
    lq.fold_batchnorm(net)
    structure = lq.inspect(net, calibration[0][:1])
    for weights, activations, skip in runs:
        lq.attach(net, weights=weights, activations=activations, structure=structure, skip=skip)
        lq.calibrate(net, calibration)
        lost.append(before - top1(net, test))
        print(f"{name}: float {before:.1f}, W{weights}A{activations} skip={skip} loses {lost[-1]:.1f}")
        lq.detach(net)
    return lost


@pytest.mark.parametrize("width", [3, 2])
def test_allocation_of_resnet20(width: int) -> None:
    """At the bytes of a uniform width, layers beat uniform and channels beat layers, in top-1 and by far."""
    net, calibration, test = load("cifar10_resnet20")
    lq.fold_batchnorm(net)
    structure = lq.inspect(net, calibration[0][:1])
    found = {}
    lq.calibrate(lq.attach(net, width, 8, structure=structure), calibration)
    found["uniform"], size = top1(net, test), lq.summary(net).bytes
    sensitivity = lq.measure_sensitivity(net, calibration, "model_fisher", activations=False)
    for granularity in get_args(Granularity):
        allocation = lq.allocate(net, sensitivity, f"{size}B", granularity=granularity)
        lq.set_bits(net, allocation.weights)
        assert lq.summary(net).bytes <= size
        assert allocation.gap <= 0.005
        found[granularity] = top1(lq.calibrate(net, calibration), test)
    print(f"W{width}: {found}")
    assert found["layer"] > found["uniform"] + 5
    assert found["channel"] > found["layer"]


def test_resnet20() -> None:
    """The goal at W8A8 is 0.3 points."""
    runs = [(8, 8, False), (4, 8, False), (4, 4, False), (8, 8, True), (4, 4, True)]
    w8a8, w4a8, w4a4, w8a8_skip, w4a4_skip = losses("cifar10_resnet20", runs)
    assert w8a8 <= 0.3
    assert w4a8 <= 2
    assert w4a4 <= 3
    assert w8a8_skip <= 0.5
    assert w4a4_skip <= 4


@pytest.mark.slow
def test_efficientnet_lite0() -> None:
    """The goal at W8A8 is 1.0 point; 4-bit weights need more than nearest rounding (W4A8: 10.0 %)."""
    w8a8, w8a8_skip = losses("tf_efficientnet_lite0", [(8, 8, False), (8, 8, True)])
    assert w8a8 <= 1.0
    assert w8a8_skip <= 1.0


@pytest.mark.slow
def test_vit_tiny() -> None:
    """The goal at W8A8 is 1.5 points; 1.6 was measured (one GELU output with a huge channel costs most of it)."""
    w8a8, w4a8 = losses("vit_tiny_patch16_224", [(8, 8, False), (4, 8, False)])
    assert w8a8 <= 2.2
    assert w4a8 <= 11


@pytest.mark.slow
def test_prepared_vision_transformer() -> None:
    """Channels behind layer norms at one range: many points at W4A4, with the products of attention in float."""
    net, calibration, test = load("vit_tiny_patch16_224")
    calibration, test = calibration[:2], test[:4]
    before, found = top1(net, test), []
    for prepared in (False, True):
        if prepared:
            lq.prepare(net, calibration)
            assert abs(top1(net, test) - before) <= 0.5
        structure = lq.inspect(net, calibration[0][:1])
        lq.attach(net, 4, 4, structure=structure, exclude=["*.attn.matmul_*"])
        found.append(top1(lq.calibrate(net, calibration), test))
        lq.detach(net)
    print(f"vit_tiny_patch16_224: float {before:.1f}, W4A4 {found[0]:.1f}, prepared {found[1]:.1f}")
    assert found[1] > found[0] + 5
