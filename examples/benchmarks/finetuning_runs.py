"""Runs of fine-tuning on CIFAR-10, and what a user would list for each method; `finetuning.py` starts them."""

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from benchmark_results import append, rows
from lq.callbacks import AllocateBits, FineTune, FreezeOscillations, LearnNoiseScale, Quantize
from real_data import pack

TITLES = {
    "float": "float",
    "ptq": "PTQ",
    "ste": "STE",
    "lsq": "LSQ",
    "lsq_plus": "LSQ+",
    "ewgs": "EWGS",
    "adaptive_ewgs": "adaptive EWGS",
    "stableqat": "StableQAT",
    "lsq_freeze": "LSQ, oscillations frozen",
    "lsq_dampen": "LSQ, oscillations dampened",
    "noise": "noise scale",
    "noise8": "noise scale, from 8 bits",
    "free": "noise scale, bits on average",
    "free_allocated": "the same, from an allocation",
}
#: Pretrained networks by name; and the learning rates that they are trained by on CIFAR-10, in float and quantized.
NETWORKS = {"resnet20": "cifar10_resnet20", "lite0": "tf_efficientnet_lite0"}
FLOAT_LR, RATES = 0.02, {"resnet20": 2e-3, "lite0": 1e-3}
BATCH = 128
QUANTIZER_LR, DAMPENING = 0.03, 0.1


class Classifier(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of quantization."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


class FloatClassifier(Classifier):
    """The same, as the float network is trained."""

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)


class Images(L.LightningDataModule):
    """CIFAR-10 as bytes; normalised, and while training cropped and flipped, a batch at a time.

    Order, crops and flips depend on seed and step only: all methods see the same images.
    """

    def __init__(self, reader: Any, folder: Path, options: argparse.Namespace) -> None:
        super().__init__()
        card, count = reader.cards()[NETWORKS[options.network]], options.images
        self.batch = options.batch
        self.train, self.test = (_cached(reader, folder, split, count) for split in ("train", "test"))
        self.mean, self.std = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.seed = 0

    def train_dataloader(self) -> Any:
        order = torch.Generator().manual_seed(self.seed)
        whole = len(self.train) >= self.batch
        return DataLoader(self.train, batch_size=self.batch, shuffle=True, drop_last=whole, generator=order)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.test, batch_size=500)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        pixels, labels = batch
        images = (pixels.float() / 255 - self.mean) / self.std
        if self.trainer is not None and self.trainer.training:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.trainer.global_step)
            images = augmented(images, generator)
        return images, labels


def augmented(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random crops of the padded images, half of them flipped."""
    count, channels, size, _ = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    place = torch.arange(size)
    rows = (top + place)[:, None, :, None]
    columns = (left + torch.where(flip, size - 1 - place, place))[:, None, None, :]
    padded = F.pad(images, (padding,) * 4)
    return padded[torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def _cached(reader: Any, folder: Path, split: str, count: int | None) -> TensorDataset:
    """Images of a split and their labels, decoded once; `count` of them by chance, for they are sorted by class."""
    path = folder / f"images_{split}.pt"
    if not path.exists():
        pixels, labels = reader.cifar10_jpeg(split)
        tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
        partial = path.with_suffix(f".{time.time_ns()}")
        torch.save(tensors, partial)
        partial.replace(path)  # another process may be at it too
    images, labels = torch.load(path)
    if count is None:
        return TensorDataset(images, labels)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return TensorDataset(images[chosen], labels[chosen])


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What to run.

    Its result has top1 in percent, kl in nats, minutes of training, average_bits, bytes as stored, and where weights
    that oscillate are counted, the shares of those that do, and that are frozen, in the end.
    """

    method: str
    bits: int
    seed: int
    steps: int
    distill: bool
    images: int | None
    network: str = "resnet20"
    batch: int = BATCH


Results = dict[Run, dict[str, float]]


class Bench:
    """Images, the float network and what it says of the test images."""

    def __init__(self, options: argparse.Namespace, folder: Path, network: Path | None) -> None:
        self.reader, self.network = pack(), options.network
        if network is not None and not network.exists():
            raise SystemExit(f"{network} is not there; make it with: finetuning.py float --output {network}")
        folder.mkdir(parents=True, exist_ok=True)
        self.state = None if network is None else torch.load(network)
        self.images = Images(self.reader, folder, options)
        self.reference = self.logits(self.module("float"))

    def module(self, method: str, faster: float = 1.0) -> Classifier:
        """The user's module around a new copy of the float network."""
        net = self.reader.load_model(NETWORKS[self.network])[0]
        if self.network == "lite0":
            torch.manual_seed(0)
            net.reset_classifier(10)
            net.conv_stem.stride = (1, 1)  # images are 32 px, not 224
        if self.state is not None:
            net.load_state_dict(self.state)
        net.train()  # it comes in eval mode, and Lightning would train it so
        if method == "float":
            return FloatClassifier(net, FLOAT_LR)
        return Classifier(net, faster * RATES[self.network])

    def trainer(self, seed: int = 0, **arguments: Any) -> L.Trainer:
        """An ordinary Trainer that shows and keeps nothing."""
        L.seed_everything(seed, verbose=False)
        self.images.seed = seed
        quiet = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
        return L.Trainer(accelerator="cpu", **{**dict.fromkeys(quiet, False), **arguments})

    def logits(self, module: Classifier) -> Tensor:
        """Output on the test images."""
        found: Any = self.trainer().predict(module, self.images)
        return torch.cat(found)

    def score(self, module: Classifier) -> tuple[float, float]:
        """Top-1 in percent; KL divergence to the float network, in nats."""
        found, target = self.logits(module).log_softmax(1), self.reference.log_softmax(1)
        top1 = 100 * float((found.argmax(1) == self.images.test.tensors[1]).float().mean())
        return top1, float((target.exp() * (target - found)).sum(1).mean())

    def size(self, bits: int) -> int:
        """Bytes of the network with one width everywhere but in the first and last layers."""
        return lq.summary(lq.attach(self.module("float"), bits, bits)).bytes if bits <= 16 else 0

    def run(self, run: Run) -> dict[str, float]:
        """Quantize and fine-tune the float network."""
        module = self.module(run.method)
        length = {"max_epochs": -1, "max_steps": run.steps} if run.steps else {"max_epochs": 0}
        made = callbacks(run.method, run.bits, distill=run.distill, size=self.size(run.bits))
        trainer = self.trainer(run.seed, callbacks=made, **length)
        start = time.perf_counter()
        trainer.fit(module, self.images)
        found = {"minutes": (time.perf_counter() - start) / 60}
        if made:
            summary = lq.summary(module)
            found |= {"average_bits": summary.average_bits, "bytes": summary.bytes}
            for each in made:
                if isinstance(each, FreezeOscillations):
                    found |= {name.partition("/")[2]: share for name, share in each.numbers.items()}
        return dict(zip(("top1", "kl"), self.score(module), strict=True)) | found


def callbacks(method: str, bits: int, *, distill: bool, size: int = 0, faster: float = 1.0) -> list[Any]:
    """What a user would list; `size` in bytes where bits are learned, the callback's learning rate `faster`."""
    if method == "float":
        return []
    free = method in ("free", "free_allocated")
    noise = free or method in ("noise", "noise8")
    start = 8 if free or method == "noise8" else bits
    quantize = Quantize(weights=start, activations=start, fold_bn=False, calibration_samples=512)
    if method == "ptq":
        return [quantize]
    common: dict[str, Any] = {
        "quantizer_lr": faster * QUANTIZER_LR,
        "distill": float(distill),
        "distill_loss": "symmetric_kl",
        "task": 0.0 if distill else 1.0,
    }
    if noise:
        until = {"free": 0.5}.get(method, 0.1)  # an allocation needs refinement only
        aim: dict[str, Any] = {"budget": f"{size}B"} if free else {"weights": bits}
        learn = LearnNoiseScale(**aim, activations=bits, until=until, **common)
        if method == "free_allocated":
            return [quantize, AllocateBits(f"{size}B", "model_fisher", granularity="channel"), learn]
        return [quantize, learn]
    estimator = "lsq" if method in ("lsq_freeze", "lsq_dampen") else method
    dampening = DAMPENING if method == "lsq_dampen" else 0.0
    freeze = FreezeOscillations() if method == "lsq_freeze" else FreezeOscillations(start=1.0, end=1.0)  # counts alone
    return [quantize, FineTune(estimator, dampening=dampening, **common), freeze]


def runs_of(methods: Iterable[str], options: argparse.Namespace) -> list[Run]:
    """The float network and every method at every width, with its seeds."""
    found = [Run("float", 32, 0, 0, False, options.images, options.network, options.batch)]
    for bits in options.bits:
        for seed in range(options.seeds if bits == 2 else options.seeds_other):
            for method in methods:
                tuned = method != "ptq"
                found.append(
                    Run(
                        method,
                        bits,
                        seed,
                        options.steps * tuned,
                        options.distill and tuned,
                        options.images,
                        options.network,
                    )
                )
    return found


def read(folder: Path) -> Results:
    """Every result that is there."""
    return {Run(**row["run"]): row["result"] for row in rows(folder / "results.jsonl")}


def work(runs: list[Run], options: argparse.Namespace) -> None:
    """Do what is not there yet of this process's part."""
    mine = runs[options.part :: options.of]
    bench: Bench | None = None
    for number, run in enumerate(mine, 1):
        if run in read(options.output):
            continue
        bench = bench or Bench(options, options.output, options.float or options.output / "float.pt")
        result = bench.run(run)
        append(options.output / "results.jsonl", {"run": asdict(run), "result": result})
        name = f"{TITLES[run.method]} W{run.bits}A{run.bits}, seed {run.seed}"
        found = f"{result['top1']:6.2f}  {result['kl']:8.4f}  {result['minutes']:6.1f} min"
        print(f"  {number:3}/{len(mine)}  {name:46} {found}", flush=True)
