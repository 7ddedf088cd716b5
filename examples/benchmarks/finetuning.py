"""What fine-tuning brings at few bits: ResNet-20 on CIFAR-10, all methods with the same optimizer, images and steps.

Adam with a cosine to zero, symmetric KL to the float network as the only loss, learned steps at 0.03 octaves an update:
what worked best for LSQ in runs as short as these.

The pretrained network and the images (50 000 to train, 10 000 to test, after JPEG) are read from the folder in the
environment variable LQ_DATA (its pack.py). The network is first fine-tuned in float on these images; every other part
starts from that. Test labels are for reporting only.

    python examples/benchmarks/finetuning.py float         # the float network, saved
    python examples/benchmarks/finetuning.py table         # methods and widths; resumes where it was stopped
    python examples/benchmarks/finetuning.py table --part 0 --of 2    # half of it; run --part 1 beside
    python examples/benchmarks/finetuning.py show          # the table of what is there
    python examples/benchmarks/finetuning.py free          # noise scale: 3 bits everywhere, or on average
    python examples/benchmarks/finetuning.py diverge       # learning rates ten times too high

Each finished run is a line of OUTPUT/results.jsonl; to run it again, remove the line.
"""

import argparse
import json
import logging
import runpy
import statistics
import time
import warnings
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
from lq.callbacks import AllocateBits, FineTune, LearnNoiseScale, Quantize
from lq.sites import quantizers

TITLES = {
    "float": "float",
    "ptq": "PTQ",
    "ste": "STE",
    "lsq": "LSQ",
    "lsq_plus": "LSQ+",
    "ewgs": "EWGS",
    "adaptive_ewgs": "adaptive EWGS",
    "noise": "noise scale",
    "noise8": "noise scale, from 8 bits",
    "free": "noise scale, bits on average",
    "free_allocated": "the same, from an allocation",
}
METHODS = tuple(TITLES)[1:-2]
BATCH = 128
FLOAT_LR, LR, QUANTIZER_LR = 0.02, 2e-3, 0.03
ABOUT_LIGHTNING = ".*(does not have many workers|LeafSpec).*"


class Classifier(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of quantization."""

    def __init__(self, net: nn.Module, lr: float = LR) -> None:
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
        return torch.optim.SGD(self.parameters(), FLOAT_LR, momentum=0.9, weight_decay=1e-4, nesterov=True)


class Images(L.LightningDataModule):
    """CIFAR-10 as bytes; normalised, and while training cropped and flipped, a batch at a time.

    Order, crops and flips depend on seed and step only: all methods see the same images.
    """

    def __init__(self, reader: Any, folder: Path, count: int | None) -> None:
        super().__init__()
        card = reader.cards()["cifar10_resnet20"]
        self.train, self.test = (_cached(reader, folder, split, count) for split in ("train", "test"))
        self.mean, self.std = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.seed = 0

    def train_dataloader(self) -> Any:
        order = torch.Generator().manual_seed(self.seed)
        whole = len(self.train) >= BATCH
        return DataLoader(self.train, batch_size=BATCH, shuffle=True, drop_last=whole, generator=order)

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
    """What to run; its result has top1 in percent, kl in nats, minutes of training, average_bits, bytes as stored."""

    method: str
    bits: int
    seed: int
    steps: int
    distill: bool
    images: int | None


Results = dict[Run, dict[str, float]]


class Bench:
    """Images, the float network and what it says of the test images."""

    def __init__(self, options: argparse.Namespace, folder: Path, network: Path | None) -> None:
        self.reader = runpy.run_path(str(Path(__file__).with_name("allocation.py")))["pack"]()
        if network is not None and not network.exists():
            raise SystemExit(f"{network} is not there; make it with: finetuning.py float --output {network}")
        folder.mkdir(parents=True, exist_ok=True)
        self.state = None if network is None else torch.load(network)
        self.images = Images(self.reader, folder, options.images)
        self.reference = self.logits(self.module("float"))

    def module(self, method: str, lr: float = LR) -> Classifier:
        """The user's module around a new copy of the float network."""
        net = self.reader.load_model("cifar10_resnet20")[0]
        if self.state is not None:
            net.load_state_dict(self.state)
        net.train()  # it comes in eval mode, and Lightning would train it so
        return (FloatClassifier if method == "float" else Classifier)(net, lr)

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
    return [quantize, FineTune(method, **common)]


def runs_of(methods: Iterable[str], options: argparse.Namespace) -> list[Run]:
    """The float network and every method at every width, with its seeds."""
    found = [Run("float", 32, 0, 0, False, options.images)]
    for bits in options.bits:
        for seed in range(options.seeds if bits == 2 else options.seeds_other):
            for method in methods:
                tuned = method != "ptq"
                found.append(Run(method, bits, seed, options.steps * tuned, options.distill and tuned, options.images))
    return found


def read(folder: Path) -> Results:
    """Every result that is there."""
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Run(**row["run"]): row["result"] for row in map(json.loads, lines)}


def work(runs: list[Run], options: argparse.Namespace) -> None:
    """Do what is not there yet of this process's part."""
    mine = runs[options.part :: options.of]
    bench: Bench | None = None
    for number, run in enumerate(mine, 1):
        if run in read(options.output):
            continue
        bench = bench or Bench(options, options.output, options.float or options.output / "float.pt")
        result = bench.run(run)
        with (options.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": asdict(run), "result": result}) + "\n")
        name = f"{TITLES[run.method]} W{run.bits}A{run.bits}, seed {run.seed}"
        found = f"{result['top1']:6.2f}  {result['kl']:8.4f}  {result['minutes']:6.1f} min"
        print(f"  {number:3}/{len(mine)}  {name:46} {found}", flush=True)


# --- parts -----------------------------------------------------------------------------------------------------------


def train_float(options: argparse.Namespace) -> None:
    """Fine-tune the pretrained network in float."""
    bench = Bench(options, options.output.parent, None)
    module = bench.module("float")
    before, start = bench.score(module)[0], time.perf_counter()
    bench.trainer(max_epochs=options.epochs).fit(module, bench.images)
    minutes = (time.perf_counter() - start) / 60
    torch.save(module.net.state_dict(), options.output)
    after = bench.score(module)[0]
    print(f"float: {before:.2f} %, fine-tuned {after:.2f} %, {minutes:.1f} min; saved {options.output}")


def show(options: argparse.Namespace) -> None:
    """The table, in markdown."""
    runs = runs_of(options.methods, options)
    there = {run: result for run, result in read(options.output).items() if run in runs}
    whole = there[runs[0]]["top1"] if runs[0] in there else float("nan")
    print(f"top-1 % on the test images (difference to float; KL to float), {options.steps} steps of {BATCH}\n")
    print("| method | " + " | ".join(f"W{bits}A{bits}" for bits in options.bits) + " | minutes |")
    print("|---" * (len(options.bits) + 2) + "|")
    print("| float | " + f"{whole:.2f} | " * len(options.bits) + "- |")
    for method in options.methods:
        mine = {run: result for run, result in there.items() if run.method == method}
        cells = []
        for bits in options.bits:
            top1, kl = ([result[key] for run, result in mine.items() if run.bits == bits] for key in ("top1", "kl"))
            change = f"({statistics.mean(top1) - whole:+.2f}; {statistics.mean(kl):.4f})" if top1 else ""
            cells.append(f"{spread(top1)} {change}".strip())
        minutes = f"{statistics.mean(result['minutes'] for result in mine.values()):.1f}" if mine else "-"
        print(f"| {TITLES[method]} | " + " | ".join(cells) + f" | {minutes} |")


def spread(values: list[float], sign: str = "") -> str:
    """Mean, and the standard deviation if there are several."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


def free(options: argparse.Namespace) -> None:
    """Noise scale with the same width everywhere and with that width on average, on the same seeds."""
    options.seeds_other = options.seeds
    methods = ("noise", "free", "free_allocated")
    runs = runs_of(methods, options)
    work(runs, options)
    there = read(options.output)
    print("top-1 %, KL to float, bits per weight, stored bytes")
    for run in (run for run in runs[1:] if run in there):
        top1, kl, average, size = (there[run][key] for key in ("top1", "kl", "average_bits", "bytes"))
        name = f"{TITLES[run.method]}, {run.bits} bits, seed {run.seed}"
        print(f"  {name:44} {top1:6.2f}  {kl:8.4f}  {average:6.3f}  {size}")
    for index, method in enumerate(methods[1:], 1):
        pairs = [pair for pair in zip(runs[1::3], runs[1 + index :: 3], strict=True) if {*pair} <= {*there}]
        gain = [there[b]["top1"] - there[a]["top1"] for a, b in pairs]
        print(f"{TITLES[method]}, minus the same width everywhere: {spread(gain, '+')} points")


def diverge(options: argparse.Namespace) -> None:
    """What happens when learning rates are far too high."""
    bench = Bench(options, options.output, options.float or options.output / "float.pt")
    print(f"{options.steps} steps, learning rates x {options.faster:g}: loss, top-1 %, least and largest step")
    for bits, method in ((b, m) for b in options.bits for m in options.methods if m != "ptq"):
        module = bench.module(method, LR * options.faster)
        made = callbacks(method, bits, distill=options.distill, faster=options.faster)
        trainer = bench.trainer(max_epochs=-1, max_steps=options.steps, callbacks=made)
        happened, top1 = [], float("nan")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", ABOUT_LIGHTNING)
            try:
                trainer.fit(module, bench.images)
                top1 = bench.score(module)[0]
            except (lq.errors.LqError, RuntimeError) as error:
                happened.append(f"stopped at step {trainer.global_step}: {type(error).__name__}: {error}")
        happened += sorted({f"{each.category.__name__}: {each.message}" for each in caught})
        steps = torch.cat([quantizer.step.detach().flatten() for quantizer in quantizers(module)])
        loss = float(trainer.callback_metrics.get("train_loss", torch.nan))
        figures = f"{loss:8.4f}  {top1:6.2f}  {float(steps.min()):.3g}  {float(steps.max()):.3g}"
        title = f"{TITLES[method]} W{bits}A{bits}"
        print("\n      ".join([f"  {title:18} {figures}", *happened]), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--images", type=int, help="only this many images to train and to test with")
    common.add_argument("--threads", type=int, default=1)
    tuned = argparse.ArgumentParser(add_help=False, parents=[common])
    tuned.add_argument("--output", type=Path, default=Path("outputs/finetuning"), help="folder for results and images")
    tuned.add_argument("--float", type=Path, help="the float network; by default OUTPUT/float.pt")
    tuned.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    tuned.add_argument("--distill", action=argparse.BooleanOptionalAction, default=True, help="from the float network")
    tuned.add_argument("--seeds", type=int, default=3, help="seeds at 2 bits, and of `free`")
    tuned.add_argument("--seeds-other", type=int, default=1, help="seeds at other widths")
    tuned.add_argument("--part", type=int, default=0, help="which part of the runs, from 0")
    tuned.add_argument("--of", type=int, default=1, help="number of parts")
    one = parts.add_parser("float", parents=[common], help="fine-tune the float network")
    one.add_argument("--output", type=Path, default=Path("outputs/finetuning/float.pt"))
    one.add_argument("--epochs", type=int, default=6)
    for name, bits, steps in (
        ("table", [4, 3, 2, 1], 200),
        ("show", [4, 3, 2, 1], 200),
        ("free", [3], 200),
        ("diverge", [2], 300),
    ):
        part = parts.add_parser(name, parents=[tuned])
        part.add_argument("--bits", nargs="+", type=int, default=bits)
        part.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of {BATCH} images")
    parts.choices["diverge"].add_argument("--faster", type=float, default=10.0, help="factor on learning rates")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ABOUT_LIGHTNING)
    if options.command == "table":
        work(runs_of(options.methods, options), options)
    {"float": train_float, "table": show, "show": show, "free": free, "diverge": diverge}[options.command](options)


if __name__ == "__main__":
    main()
