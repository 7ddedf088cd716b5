"""Real models and images, read from the folder in the environment variable LQ_DATA (its pack.py)."""

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lq

Batches = list[tuple[Tensor, Tensor]]


def pack() -> Any:
    """The reader of the data folder."""
    folder = os.environ.get("LQ_DATA")
    if folder is None:
        raise SystemExit("set LQ_DATA to the folder with real weights and images (the one with pack.py)")
    spec = importlib.util.spec_from_file_location("pack", Path(folder) / "pack.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} has no pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str, images: int = 1024, *, fold: bool = True) -> tuple[nn.Module, Batches, Batches]:
    """A model, its BatchNorms folded if asked, training batches (at most `images`), test batches."""
    reader = pack()
    net, card = reader.load_model(name)
    if name.startswith("cifar10"):
        train, test = (
            TensorBatches(reader.cifar_tensor(pixels, card), torch.from_numpy(labels), 64)
            for pixels, labels in (reader.cifar10("train"), reader.cifar10("test"))
        )
    else:
        train, test = (reader.ImageSet(part, card) for part in ("calib_ilsvrc_train", "val_nips17_ccby"))
        train, test = (list(torch.utils.data.DataLoader(part, 32)) for part in (train, test))
    chosen = list(train)[: -(-images // len(next(iter(train))[0]))]
    if fold:
        lq.fold_batchnorm(net)
    return net.eval(), chosen, list(test)


def TensorBatches(x: Tensor, y: Tensor, size: int) -> Batches:  # noqa: N802
    """Tensors as batches."""
    return list(zip(x.split(size), y.split(size), strict=True))


def prepared(net: nn.Module, batches: Batches, weights: int = 8, activations: int = 8) -> nn.Module:
    """A quantized, calibrated copy."""
    model = copy.deepcopy(net)
    lq.attach(model, weights, activations, structure=lq.inspect(model, batches[0][0][:1]))
    return lq.calibrate(model, batches)
