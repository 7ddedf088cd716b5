"""Data modules of images: folders, data sets of torchvision, handwritten digits.

Images are made what the model was trained on: timm's size, interpolation, crop, mean and deviation. That is the
``data_config`` of the data module, if it is given one, else that of the LightningModule it serves (as
`lq.cli.timm_module.TimmClassifier` has), else ImageNet's. Nothing is downloaded unless it is asked for.
"""

from lq.cli.data.base import ImageData as ImageData
from lq.cli.data.digits import DigitsData as DigitsData
from lq.cli.data.folder import ImageFolderData as ImageFolderData
from lq.cli.data.of_torchvision import TorchvisionData as TorchvisionData
