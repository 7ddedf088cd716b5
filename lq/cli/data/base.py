"""The base of the data modules: loaders, transforms, and the check that data and model have the same classes."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lq.cli.usage import require
from lq.errors import DataError

#: Every so many images one is held out, where data come without a part for validation.
HELD_OUT = 5

#: Processes that load images, by default: no more than there are cores.
WORKERS = min(4, os.cpu_count() or 1)

# What timm resizes images to if nobody says otherwise.
_IMAGENET = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}


class ImageData(pl.LightningDataModule, ABC):
    """Base of the data modules: loaders, transforms, and the check that data and model have the same classes.

    Subclasses set ``classes`` (names or a number) and ``parts`` in `_read`.

    Args:
        batch_size: images in a batch.
        workers: processes that load images.
        image_size: height and width of images; None: the model's.
        augment: vary training images as timm does (random crop and flip); None: if the Trainer trains, and not where it
            only calibrates and reconstructs (``max_epochs=0``).
        data_config: timm's description of images (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``);
            what it leaves out is the model's.
    """

    def __init__(
        self,
        batch_size: int = 64,
        workers: int = WORKERS,
        image_size: int | None = None,
        augment: bool | None = None,
        data_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("image_size", image_size, 1),
        ):
            if value is not None and value < least:
                raise DataError(f"{name}={value}: expected {least} or more")
        self.batch_size = batch_size
        self.workers = workers
        self.image_size = image_size
        self.augment = augment
        self.data_config = data_config
        self.classes: Sequence[str] | int = 0
        self.parts: dict[str, Dataset[Any]] = {}
        self._read_for: tuple[Any, ...] | None = None

    @override
    def setup(self, stage: str) -> None:
        """Find the images; check that the model has as many classes."""
        module = None if self.trainer is None else self.trainer.lightning_module
        config, augment = self._config(module), self._augments()
        if self._read_for != (config, augment):
            self._read(config, augment)
            self._read_for = (config, augment)
        self.require_classes(getattr(module, "num_classes", None))

    @override
    def train_dataloader(self) -> Any:
        """Training images, shuffled."""
        return self._loader("train", shuffle=True)

    @override
    def val_dataloader(self) -> Any:
        """Validation images."""
        return self._loader("val")

    @override
    def test_dataloader(self) -> Any:
        """Test images; those of validation, if there are no others."""
        return self._loader("test" if "test" in self.parts else "val")

    @override
    def predict_dataloader(self) -> Any:
        """The same images as for tests."""
        return self.test_dataloader()

    def require_classes(self, expected: int | None, option: str = "--model.num_classes {count}") -> None:
        """Raise if a model has not as many classes as the data.

        Args:
            expected: how many the model has; None: unknown.
            option: how a command line is told how many, for the message.

        Raises:
            DataError: if it has more or fewer: the labels would be of other classes.
        """
        count = self.classes if isinstance(self.classes, int) else len(self.classes)
        if expected is not None and expected != count:
            raise DataError(
                f"{self._described()} has {count} classes, the model has {expected}; labels would not be those of the "
                f"model: give it num_classes={count} ({option.format(count=count)}){self._advice(count, expected)}"
            )

    @abstractmethod
    def _read(self, config: dict[str, Any], augment: bool) -> None:
        """Set ``classes`` and ``parts``."""

    @abstractmethod
    def _described(self) -> str:
        """What the data are, for messages."""

    def _advice(self, count: int, expected: int) -> str:
        return ""

    def _config(self, module: Any) -> dict[str, Any]:
        """What images have to look like."""
        config = {**_IMAGENET, **(getattr(module, "data_config", None) or {}), **(self.data_config or {})}
        size = tuple(config["input_size"])
        if self.image_size is not None:
            size = (size[0], self.image_size, self.image_size)
        return {**config, "input_size": size, "mean": tuple(config["mean"]), "std": tuple(config["std"])}

    def _augments(self) -> bool:
        if self.augment is not None:
            return self.augment
        return self.trainer is not None and self.trainer.max_epochs != 0 and self.trainer.state.fn == "fit"

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any]:
        if part not in self.parts:
            raise DataError(f"{self._described()} has no part for {part!r}; it has {', '.join(self.parts) or 'none'}")
        images = self.parts[part]
        keep = self.workers > 0
        return DataLoader(
            images, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.workers, persistent_workers=keep
        )


def transforms(config: Mapping[str, Any], augment: bool) -> Callable[[Any], Any]:
    """From a picture to a tensor, as timm does for a model.

    Args:
        config: timm's description of images.
        augment: with random crop and flip.

    Returns:
        A function from an image of PIL to a tensor ``(channels, height, width)``.
    """
    require("timm", "timm")
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import Compose, Grayscale

    known = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    given = {key: config[key] for key in known if key in config}
    size = given["input_size"]
    if augment and min(size[1:]) <= 64:  # timm's crops are for photographs: of small images little would be left
        given["scale"] = (0.6, 1.0)
    if augment:
        given = {key: value for key, value in given.items() if key not in ("crop_pct", "crop_mode")}
        given |= {"color_jitter": None}
    made = create_transform(**given, is_training=augment)
    composed: Callable[[Any], Any] = Compose([_Rgb() if size[0] == 3 else Grayscale(size[0]), made])
    return composed


class _Rgb:
    """Pictures in three channels, whatever they were stored in."""

    def __call__(self, image: Any) -> Any:
        return image.convert("RGB")
