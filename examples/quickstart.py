"""Quantize a timm model on real images, in a few minutes on two cores.

Trains a small timm ResNet on scikit-learn's handwritten digits (1 797 real images), then quantizes it with the
callbacks of lq: post-training to 8 and 4 bits, fine-tuned at 4 and 2 bits. Prints a table, draws accuracy against size,
saves the 2-bit model and loads it back.

    python examples/quickstart.py --output outputs/quickstart
"""

import argparse
import copy
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lq
from lq.callbacks import FineTune, Quantize, load_from_checkpoint


class Classifier(L.LightningModule):
    """An ordinary LightningModule around a timm model: nothing in it knows of quantization."""

    def __init__(self, name: str = "test_resnet", lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.model = timm.create_model(name, in_chans=1, num_classes=10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Digits(L.LightningDataModule):
    """The digits, 8x8 pixels, enlarged to what the model takes; every fifth image is for validation."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        images = F.interpolate(images, size=size, mode="bilinear")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out = torch.arange(len(images)) % 5 == 0
        data = images[order], torch.from_numpy(labels)[order]
        self.train = TensorDataset(*(part[~held_out] for part in data))
        self.val = TensorDataset(*(part[held_out] for part in data))

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=256)


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    accuracy: float
    size: int
    bits: float
    seconds: float


def fit(module: Classifier, data: Digits, epochs: int, callbacks: list[Any], progress: bool) -> L.Trainer:
    """Run an ordinary Trainer; with no epochs it only runs the callbacks."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    return trainer


def accuracy(module: Classifier, data: Digits) -> float:
    """Validation accuracy in percent, of the module as it is."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return 100 * float(trainer.validate(module, data, verbose=False)[0]["accuracy"])


def measure(name: str, module: Classifier, data: Digits, started: float) -> Result:
    """Accuracy and stored size of a module."""
    seconds = time.perf_counter() - started
    if name == "float":
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        return Result(name, accuracy(module, data), size, 32.0, seconds)
    found = lq.summary(module)
    return Result(name, accuracy(module, data), found.bytes, found.average_bits, seconds)


def show(results: list[Result]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "accuracy %", "size kB", "bits per weight", "seconds", title="test_resnet on digits")
    for row in results:
        cells = (f"{row.accuracy:.2f}", f"{row.size / 1e3:.1f}", f"{row.bits:.2f}", f"{row.seconds:.1f}")
        table.add_row(row.name, *cells)
    Console().print(table)


def plot(results: list[Result], path: Path) -> None:
    """Draw accuracy against size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for row in results:
        axes.plot(row.size / 1e3, row.accuracy, "o", label=row.name)
    axes.set(xscale="log", xlabel="size (kB)", ylabel="validation accuracy (%)", title="Accuracy against size")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/quickstart"), help="folder for checkpoint and plot"
    )
    parser.add_argument(
        "--epochs", type=int, default=15, help="epochs of the float training; fine-tuning takes 2/3 (4 bits) or 4/3"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    L.seed_everything(0, verbose=False)
    data, progress, epochs = Digits(), not options.no_progress, options.epochs

    started = time.perf_counter()
    network = Classifier()
    fit(network, data, epochs, [], progress)
    results = [measure("float", network, data, started)]

    stages: dict[str, tuple[int, list[Any]]] = {
        "W8A8 post-training": (0, lq.recipe("ptq_w8a8")),
        "W4A4 post-training": (0, [Quantize(weights=4, activations=4)]),
        "W4A4 fine-tuned": (epochs * 2 // 3, [Quantize(weights=4, activations=4, fold_bn=False), FineTune("lsq")]),
        "W2A2 fine-tuned": (epochs * 4 // 3, lq.recipe("lsq_w2a2")),
    }
    for name, (stage_epochs, callbacks) in stages.items():
        started = time.perf_counter()
        module = copy.deepcopy(network)
        trainer = fit(module, data, stage_epochs, callbacks, progress)
        results.append(measure(name, module, data, started))

    print(lq.summary(module))
    show(results)
    plot(results, options.output / "accuracy_vs_size.png")

    checkpoint = options.output / "digits_w2a2.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=True)
    again = load_from_checkpoint(Classifier, checkpoint)
    images = data.val.tensors[0]
    with torch.no_grad():
        same = torch.equal(again.eval()(images), module.eval()(images))
    print(f"Saved {checkpoint} and {options.output / 'accuracy_vs_size.png'}.")
    print(f"Loaded the checkpoint back: outputs on {len(images)} images are {'identical' if same else 'DIFFERENT'}.")
    if not same:
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    main()
