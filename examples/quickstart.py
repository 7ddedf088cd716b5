"""Quantize a timm model on real images, in a few minutes on two cores.

Trains a small timm ResNet on scikit-learn's handwritten digits (1 797 real images), then quantizes it with the
callbacks of lq: post-training to 8 and 4 bits, fine-tuned at 4 and 2 bits. Prints a table, draws accuracy against size,
saves the 2-bit model and loads it back. Then writes packed files and ONNX, and runs them in onnxruntime.

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


@dataclass(frozen=True)
class Exported:
    """One row of the table of files; `alike` is the share of images with the same top-1 as the module's, in percent."""

    name: str
    packed: int
    onnx: int
    alike: float
    milliseconds: float


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


def export(modules: dict[str, Classifier], network: Classifier, data: Digits, folder: Path) -> list[Exported]:
    """Write packed and ONNX files of quantized modules, and run all in onnxruntime beside the float network."""
    import onnxruntime

    images = data.val.tensors[0]
    files = {"float": folder / "digits_float.onnx"}
    whole = copy.deepcopy(network.model).eval()
    lq.fold_batchnorm(whole)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        whole, (images[:2],), files["float"], dynamic_shapes=({0: batch},), external_data=False, verbose=False
    )
    packed, alike = {"float": sum(p.numel() * 4 for p in whole.state_dict().values())}, {"float": 100.0}
    for name, module in modules.items():
        files[name] = folder / f"digits_{name.split()[0].lower()}.onnx"
        report = lq.export_onnx(module.model, images[:2], files[name], check=[images])
        alike[name] = 100 * (report.agreement or 0.0)
        packed[name] = lq.save(module.model, files[name].with_suffix(".safetensors"))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    sessions = {name: onnxruntime.InferenceSession(str(path), settings) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(30):  # in turn: what else the machine does hits all of them
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: images[:64].numpy()})
            times[name].append(time.perf_counter() - started)
    return [
        Exported(name, packed[name], path.stat().st_size, alike[name], 1e3 * sorted(times[name])[15])
        for name, path in files.items()
    ]


def show_files(rows: list[Exported]) -> None:
    """Print the table of files."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "packed kB", "ONNX kB", "same top-1 %", "64 images, ms", "speed", title="In onnxruntime")
    for row in rows:
        cells = (f"{row.packed / 1e3:.1f}", f"{row.onnx / 1e3:.1f}", f"{row.alike:.2f}", f"{row.milliseconds:.2f}")
        table.add_row(row.name, *cells, f"{rows[0].milliseconds / row.milliseconds:.2f}x")
    Console().print(table)


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
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    L.seed_everything(0, verbose=False)
    data, progress, epochs = Digits(), not options.no_progress, options.epochs

    started = time.perf_counter()
    network = Classifier()
    print(f"Training in float, {epochs} epochs, then quantizing in four ways: a few minutes", flush=True)
    fit(network, data, epochs, [], progress)
    results = [measure("float", network, data, started)]

    stages: dict[str, tuple[int, list[Any]]] = {
        "W8A8 post-training": (0, lq.recipe("ptq_w8a8", integer=True)),
        "W4A4 post-training": (0, [Quantize(weights=4, activations=4, integer=True)]),
        "W4A4 fine-tuned": (epochs * 2 // 3, [Quantize(4, 4, integer=True, fold_bn=False), FineTune("lsq")]),
        "W2A2 fine-tuned": (epochs * 4 // 3, lq.recipe("lsq_w2a2", integer=True)),
    }
    modules: dict[str, Classifier] = {}
    for name, (stage_epochs, callbacks) in stages.items():
        print(f"{name}{f', {stage_epochs} epochs' if stage_epochs else ''}", flush=True)
        started = time.perf_counter()
        module = copy.deepcopy(network)
        trainer = fit(module, data, stage_epochs, callbacks, progress)
        results.append(measure(name, module, data, started))
        modules[name] = module

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
    exported = ("W8A8 post-training", "W4A4 post-training", "W2A2 fine-tuned")
    show_files(export({name: modules[name] for name in exported}, network, data, options.output))
    return results


if __name__ == "__main__":
    main()
