"""Handwritten digits that come with scikit-learn: real images without a download."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from typing_extensions import override

from lq.cli.data.base import HELD_OUT, ImageData
from lq.cli.usage import require


class DigitsData(ImageData):
    """Handwritten digits of scikit-learn: 1 797 real images of 8x8 pixels in 10 classes, enlarged; they come with it.

    Every fifth image is for validation and tests.

    Args:
        batch_size: images in a batch.
        workers: processes that load images.
        image_size: height and width that they are enlarged to; None: the model's.
        data_config: timm's description of images; None: the model's. Of it counts the number of channels, the mean and
            the deviation.
    """

    def __init__(
        self,
        batch_size: int = 64,
        workers: int = 0,
        image_size: int | None = 32,
        data_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, workers, image_size, False, data_config)

    @override
    def _read(self, config: dict[str, Any], augment: bool) -> None:
        require("sklearn", "cli", "scikit-learn")
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        channels, height, width = config["input_size"]
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
        images = F.interpolate(images, size=(height, width), mode="bilinear").expand(-1, channels, -1, -1)
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        images, targets = (images - mean) / std, torch.from_numpy(labels)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held = torch.arange(len(images)) % HELD_OUT == 0
        self.classes = 10
        self.parts = {
            part: TensorDataset(images[order[chosen]], targets[order[chosen]])
            for part, chosen in (("train", ~held), ("val", held))
        }

    @override
    def _described(self) -> str:
        return "scikit-learn's digits"
