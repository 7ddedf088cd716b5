"""The data sets of torchvision, by name."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override

from lq.cli.data.base import WORKERS, ImageData, transforms
from lq.cli.usage import one_line, require, suggestion
from lq.errors import DataError


class TorchvisionData(ImageData):
    """A data set of torchvision, by its name: CIFAR10, CIFAR100, FashionMNIST, Flowers102, Food101, ImageNet, ...

    Args:
        name: name of a classification data set in ``torchvision.datasets`` that has a part for training.
        root: folder that it lies in.
        download: download it if it is not there.
        batch_size: images in a batch.
        workers: processes that load images.
        image_size: height and width of images; None: the model's.
        augment: vary training images; None: if the Trainer trains.
        data_config: timm's description of images; None: the model's.
    """

    def __init__(
        self,
        name: str,
        root: str | Path = "data",
        download: bool = False,
        batch_size: int = 64,
        workers: int = WORKERS,
        image_size: int | None = None,
        augment: bool | None = None,
        data_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, workers, image_size, augment, data_config)
        self.name = name
        self.root = Path(root)
        self.download = download
        self._kind, self._splits = _data_set(name)

    @override
    def prepare_data(self) -> None:
        """Download it, if that was asked for."""
        if self.download:
            for split in self._splits.values():
                self._open(split, None, download=True)

    @override
    def _read(self, config: dict[str, Any], augment: bool) -> None:
        plain, varied = transforms(config, False), transforms(config, augment)
        self.parts = {
            part: self._open(split, varied if part == "train" else plain) for part, split in self._splits.items()
        }
        first: Any = self.parts["train"]
        names = getattr(first, "classes", None)
        self.classes = self._count(first) if names is None else list(names)

    @override
    def _described(self) -> str:
        return f"torchvision's {self.name}"

    def _count(self, images: Any) -> int:
        """Number of classes of a data set that has no names for them."""
        for name in ("targets", "labels", "_labels", "_targets"):
            labels = getattr(images, name, None)
            if labels is not None and len(labels):
                return max(int(label) for label in labels) + 1
        raise DataError(f"torchvision's {self.name} does not say how many classes it has; use a data set of labels")

    def _open(self, split: Mapping[str, Any], transform: Any, download: bool = False) -> Dataset[Any]:
        more = {"download": download} if "download" in _parameters(self._kind) else {}
        try:
            found: Dataset[Any] = self._kind(root=str(self.root), transform=transform, **split, **more)
        except Exception as error:  # each data set has its own ways
            advice = "" if self.download else "; give the folder that it is in (--data.root), or --data.download true"
            reason = one_line(error).replace(" You can use download=True to download it", "")
            raise DataError(f"torchvision's {self.name} is not in {self.root}: {reason}{advice}") from error
        return found


def _data_set(name: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The class of a data set of torchvision, and the arguments that choose its parts."""
    require("torchvision", "timm")
    from torchvision import datasets

    kind = getattr(datasets, name, None) if name in datasets.__all__ else None
    if kind is None:
        raise DataError(f"torchvision has no data set {name!r}{suggestion(name, datasets.__all__)}")
    known = _parameters(kind)
    if "train" in known:
        return kind, {"train": {"train": True}, "val": {"train": False}}
    if "split" in known:
        held = "val" if name in ("ImageNet", "Flowers102", "DTD", "FGVCAircraft", "PCAM", "RenderedSST2") else "test"
        first = "trainval" if name == "OxfordIIITPet" else "train"
        more = {"test": {"split": "test"}} if held == "val" and name != "ImageNet" else {}
        return kind, {"train": {"split": first}, "val": {"split": held}, **more}
    raise DataError(f"torchvision's {name} has no part for training; put its images in folders, for ImageFolderData")


def _parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind).parameters)
