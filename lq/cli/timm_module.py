"""A LightningModule around any classifier of timm, ready to be trained, quantized and measured.

It knows nothing of quantization, but for one thing: a checkpoint of a quantized one restores without the callbacks that
quantized it, in a Trainer and by ``TimmClassifier.load_from_checkpoint``.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lq.attachment.checkpoint import part_of, read_state_dict, rebuild, require_fit
from lq.attachment.saved_plan import planned_by
from lq.attachment.sites import is_attached
from lq.cli.models import near_models
from lq.cli.usage import one_line, require
from lq.errors import DataError
from lq.export.loading import load
from lq.files import named, require_file

#: Makes an optimizer from parameters, such as ``lambda p: torch.optim.SGD(p, lr=0.01)``.
OptimizerOf = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]

#: Makes a schedule from an optimizer.
ScheduleOf = Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler]

# Files of tensors, plain or packed.
_SUFFIX = ".safetensors"


class TimmClassifier(pl.LightningModule):
    """A timm model that is trained by the cross-entropy and measured by its accuracy.

    Batches are ``(images, labels)``. It logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``test_loss`` and
    ``test_accuracy`` (shares, top-1); it predicts probabilities, ``(N, classes)``. ``data_config`` says what images the
    model was trained on (timm's size, mean, deviation, interpolation and crop); the data modules of `lq.cli.data` ask
    the module they serve for it.

    Args:
        name: name of a model of timm.
        num_classes: number of classes; None: as many as the model was made for, 1000 as a rule.
        pretrained: load timm's weights, from its cache or the network; the last layer is new if `num_classes` differ.
        checkpoint: file of weights to begin with: a state dict or a Lightning checkpoint with one, or a file of a
            quantized model (also a packed one).
        model_args: further arguments of ``timm.create_model``, such as ``{"in_chans": 1, "drop_path_rate": 0.1}``.
        optimizer: makes the optimizer from the parameters; None: AdamW with learning rate 1e-3 and weight decay 0.05.
        lr_scheduler: makes the schedule of the learning rate from the optimizer, stepped once an epoch; None: a cosine
            to zero over all steps of the run, for the default optimizer and others alike.
        label_smoothing: of the cross-entropy in training.

    Raises:
        DataError: if timm has no such model or cannot make it so; if the checkpoint is of another model.

    >>> TimmClassifier("test_resnet", num_classes=10).data_config["input_size"]
    (3, 160, 160)
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        pretrained: bool = False,
        checkpoint: str | Path | None = None,
        model_args: Mapping[str, Any] | None = None,
        optimizer: OptimizerOf | None = None,
        lr_scheduler: ScheduleOf | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "checkpoint", "pretrained"])  # not for restoring
        require("torchmetrics", "cli")
        from torchmetrics.classification import MulticlassAccuracy

        self.model = _created(name, num_classes, pretrained and checkpoint is None, model_args)
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.num_classes = int(getattr(self.model, "num_classes", 0))
        if self.num_classes < 2:
            raise DataError(f"{name} has {self.num_classes} classes; a classifier needs num_classes of 2 or more")
        self.data_config: dict[str, Any] = data_config_of(self.model)
        self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(self.num_classes, average="micro")
        self.label_smoothing = label_smoothing
        self._optimizer = optimizer
        self._schedule = lr_scheduler

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, channels, height, width)``."""
        logits: Tensor = self.model(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._measure(batch, "val", self.val_accuracy)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._measure(batch, "test", self.test_accuracy)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``(N, classes)``; labels are not looked at."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities: Tensor = self(images).softmax(1)
        return probabilities

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer and the schedule that were asked for."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self._optimizer is None:
            optimizer: Optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        else:
            optimizer = self._optimizer(parameters)
        if self._schedule is not None:
            return [optimizer], [self._schedule(optimizer)]
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):  # a Trainer that never ends has no cosine
            return optimizer
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(int(steps), 1))
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the quantizers of a quantized checkpoint, if no callback has.

        Raises:
            DataError: if the checkpoint is of another model.
        """
        state_dict = checkpoint.get("state_dict", {})
        if is_attached(self):
            return  # Quantize has looked at it
        if planned_by(state_dict):
            require_fit(self, state_dict)
            rebuild(self, state_dict)
        else:
            _require_same(self, state_dict)

    def _measure(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: Any) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Load a file of weights into a float model; of a quantized one, its quantizers too.

    Args:
        model: the model, in place.
        source: a state dict or checkpoint, of the model or of a module that holds it; safetensors, packed or plain.

    Raises:
        DataError: if there is no such file, or it is of another model; the model is not touched then.
    """
    path = require_file(source)
    if path.suffix == _SUFFIX and not _is_packed(path):
        from safetensors.torch import load_file

        state_dict: dict[str, Any] = load_file(path)
    elif path.suffix == _SUFFIX:
        load(path, model)
        return
    else:
        state_dict = read_state_dict(path)
    if planned_by(state_dict):
        load(path, model)
        return
    with named(path):
        part = part_of(state_dict, model)
        prefix = f"{part}." if part else ""
        found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        _require_same(model, found)
    model.load_state_dict(found)


def _is_packed(path: Path) -> bool:
    """Whether a safetensors file is one of `lq.save`."""
    from lq.export.packed import read_index

    try:
        read_index(path)
    except DataError:
        return False
    return True


def _require_same(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raise if a state dict is of another model."""
    ours = model.state_dict()
    missing = [key for key in ours if key not in state_dict]
    unknown = [key for key in state_dict if key not in ours]
    other = [
        f"{key} is {tuple(getattr(state_dict[key], 'shape', ()))} there and {tuple(ours[key].shape)} here"
        for key in ours
        if key in state_dict and getattr(state_dict[key], "shape", None) != ours[key].shape
    ]
    said = [f"it has no {', '.join(missing[:3])}"] if missing else []
    said += [f"the model has no {', '.join(unknown[:3])}"] if unknown else []
    if said or other:
        raise DataError(
            f"the checkpoint is not of this {type(model).__name__}: {'; '.join([*said, *other[:3]])}; give the name "
            "and num_classes of the model that was saved"
        )


def _created(name: str, num_classes: int | None, pretrained: bool, model_args: Mapping[str, Any] | None) -> nn.Module:
    """The model of timm."""
    require("timm", "timm")
    import timm

    given = {**({} if num_classes is None else {"num_classes": num_classes}), **(model_args or {})}
    try:
        return timm.create_model(name, pretrained=pretrained, **given)
    except Exception as error:  # what timm, its models and the network raise
        said = "".join(f", {key}={value!r}" for key, value in given.items())
        what = f"timm cannot make {name!r}{said}{', pretrained' if pretrained else ''}"
        near = near_models(name.partition(".")[0]) if "unknown model" in str(error).lower() else ""
        offline = "; without a network give weights by checkpoint=" if pretrained and not near else ""
        raise DataError(f"{what}: {one_line(error)}{near}{offline}") from error


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """Description, by timm, of the images that a model was trained on; empty for a model that is not timm's.

    For another number of input channels than it was trained with, mean and deviation are those of gray images.
    """
    if not hasattr(model, "pretrained_cfg"):
        return {}
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = config["input_size"][0] if first is None else first.in_channels
    if channels == config["input_size"][0]:
        return config
    mean, std = (sum(config[key]) / len(config[key]) for key in ("mean", "std"))
    size = (channels, *config["input_size"][1:])
    return {**config, "input_size": size, "mean": (mean,) * channels, "std": (std,) * channels}
