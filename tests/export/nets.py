"""Models to export as ONNX, how they are quantized, and their exported files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import lq
from tests.attachment.networks import images, small
from tests.attachment.test_folding import convnet, randomize
from tests.export.exported import activations, depthwise, nudged, pictures, weights
from tests.models import EXAMPLES

#: torch says so of every recurrent layer that it exports, and of its own code on the way.
OF_TORCH = [
    pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights"),
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed"),
]


@dataclass
class File:
    """An exported file, its model, an example, and what was said of it."""

    path: Path
    model: nn.Module
    x: torch.Tensor
    report: lq.OnnxReport
    before: dict[str, Any]


def convolutions(seed=0):
    torch.manual_seed(seed)
    return nudged(small(seed)).eval()


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    return nudged(model).eval(), pictures(4, 32)


def resnet():
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_resnet", num_classes=5)).eval()
    lq.fold_batchnorm(model)
    return model, pictures(4, 32)


def gated():
    """SiLUs and a gate for each channel, behind BatchNorms that stay."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_efficientnet", num_classes=5)).eval()
    return model, pictures(4, 32)


def of(kind):
    torch.manual_seed(0)
    return nudged(EXAMPLES[kind][0]()).eval(), EXAMPLES[kind][1]


def upwards(groups=1):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=groups), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    return nudged(model).eval(), pictures()


def mixed(model):
    lq.set_bits(model, {"2": [0, 1, 3, 4], "5": [2, 0, 4, 1, 8, 3, 2, 2]})


def few(bits, wide=8, **options):
    return {"weights": weights(bits, **options), "activations": activations(wide)}


NO_EDGES = {"first_last": None}

DEPTHWISE = lambda: (depthwise(), pictures())  # noqa: E731

PLAIN = lambda: (convolutions(), images(8))  # noqa: E731

#: Models with their examples, how they are quantized, arguments of the export.
FILES: dict[str, tuple[Any, ...]] = {
    "convolutions": (PLAIN, few(4, 4), {}),
    "8 bits": (PLAIN, few(8), {}),
    "2 bits": (DEPTHWISE, {**few(2, 4), **NO_EDGES}, {}),
    "2 bits in opset 21": (DEPTHWISE, {**few(2, 4), **NO_EDGES}, {"opset": 21}),
    "1 bit": (PLAIN, {**few(1, 2), **NO_EDGES}, {}),
    "zero points": (PLAIN, few(4, symmetric=False), {}),
    "2 bits with zero points": (PLAIN, {**few(2, 3, symmetric=False), **NO_EDGES}, {}),
    "by channel": (PLAIN, {**few(4), **NO_EDGES, "change": mixed}, {}),
    "16 bits": (PLAIN, few(16, 16), {}),
    "depthwise": (DEPTHWISE, {**few(4), "integer": True}, {}),
    "upwards": (upwards, few(4, 6), {}),
    "batchnorms": (lambda: (convnet().eval(), images(8)), {**few(4, 6), **NO_EDGES}, {}),
    "gated": (gated, {**few(8), "integer": True}, {}),
    "vit": (vit, {**few(4), "skip": "auto"}, {}),
    "resnet": (resnet, {**few(4), "skip": "auto", "integer": True}, {}),
    "block": (lambda: of("unfused block"), {**few(5, 5), **NO_EDGES, "skip": "auto", "integer": True}, {}),
    "encoder": (lambda: of("encoder"), {**few(4), "integer": True}, {}),
    "text": (lambda: of("text"), few(4), {}),
}

every_file = pytest.mark.parametrize("name", FILES)
