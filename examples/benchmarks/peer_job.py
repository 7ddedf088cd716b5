"""A network and its images for one tool's reconstruction, timed; `reconstruction_peers.py` hands it to a tool."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

RANGE_IMAGES = 256


def tool(name: str) -> Any:
    """A module of a tool, which type checkers need not know."""
    return importlib.import_module(name)


@dataclass
class Job:
    """A network, its images, and what was measured so far."""

    options: argparse.Namespace
    net: nn.Module
    images: Tensor
    test: tuple[Tensor, Tensor] | None
    found: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add to the seconds of `what`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        for key, seconds in ((what, time.perf_counter() - wall), (f"{what}_cpu", time.process_time() - cpu)):
            self.found[key] = self.found.get(key, 0.0) + seconds

    @torch.no_grad()
    def score(self, model: nn.Module, what: str = "top1") -> None:
        """Note top-1 on the test images, if there are some."""
        if self.test is not None:
            images, labels = self.test
            hits = [model.eval()(x).argmax(1) == y for x, y in zip(images.split(100), labels.split(100), strict=True)]
            self.found[what] = round(100 * torch.cat(hits).double().mean().item(), 3)

    def batches(self, count: int | None = None) -> list[Tensor]:
        """The first `count` images in batches."""
        return list(self.images[:count].split(self.options.batch_size))


def job_of(options: argparse.Namespace) -> Job:
    """The network in plain layers, and images: exact CIFAR-10 or ImageNet."""
    sys.path.insert(0, os.environ["LQ_DATA"])
    import pack

    net, card = pack.load_model(options.model)
    if card["input_size"] <= 32:
        (pixels, _), (others, labels) = pack.cifar10("train"), pack.cifar10("test")
        test = pack.cifar_tensor(others, card), torch.from_numpy(labels)
        return Job(options, net, pack.cifar_tensor(pixels[: options.images], card), None if options.layers else test)
    images = pack.ImageSet("calib_ilsvrc_train", card)
    chosen = torch.stack([images[i][0] for i in range(options.images)])
    return Job(options, plain(net, card["input_size"]), chosen, None)


def plain(net: nn.Module, size: int) -> nn.Module:
    """The same function without the classes of timm that tracing by torch.fx cannot follow.

    Convolutions that pad by the size of the image get fixed padding, and BatchNorms their activation as a module.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.norm_act import BatchNormAct2d
    from timm.layers.padding import get_same_padding

    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        shapes[module] = inputs[0].shape[-2:]

    handles = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, Conv2dSame)]
    with torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    for name, old in list(net.named_modules()):
        new: nn.Sequential | None = None
        if isinstance(old, Conv2dSame):
            sides = zip(shapes[old], old.kernel_size, old.stride, old.dilation, strict=True)
            high, wide = (get_same_padding(*side) for side in sides)
            conv: Any = nn.Conv2d(old.in_channels, old.out_channels, 1, groups=old.groups, bias=old.bias is not None)
            conv.kernel_size, conv.stride, conv.dilation = old.kernel_size, old.stride, old.dilation
            conv.weight = old.weight
            conv.load_state_dict(old.state_dict())
            new = nn.Sequential(nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2)), conv)
        elif isinstance(old, BatchNormAct2d):
            norm = nn.BatchNorm2d(old.num_features, old.eps)
            norm.load_state_dict(old.state_dict(), strict=False)
            new = nn.Sequential(norm, old.act)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, new)
    return net.eval()


def layers_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """All convolutions and linear layers."""
    return [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
