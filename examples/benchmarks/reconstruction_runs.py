"""Runs of reconstruction on real models and their tables: `table`, `imagenet`, `oscillation` of `reconstruction.py`."""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from benchmark_results import append, rows, spread
from lq.callbacks import Reconstruct
from real_data import pack

CIFAR = "cifar10_resnet20"
CIFAR_UNITS = 11  # stem, 9 blocks, classifier
RECIPES = {"nearest": "qdrop", "brecq_fisher": "brecq", "qdrop_feedback": "qdrop"}
WITHOUT_SEED = ("nearest", "lapq")  # and without iterations


class Classifier(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of quantization."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@dataclass(frozen=True)
class Run:
    """What to run; `iterations` are those of a unit, `skip` says which skip paths are quantized.

    Its result has top1 in percent, kl in nats, seconds, cpu_seconds of the process, and units: for each `Reconstruct`
    the name, the losses before and after, iterations and seconds of its units.
    """

    model: str
    method: str
    weights: int
    activations: int
    seed: int
    iterations: int
    images: int
    skip: bool | Literal["auto"] = "auto"

    def __str__(self) -> str:
        return f"{self.model} {self.method} W{self.weights}A{self.activations}, seed {self.seed}"


Results = dict[Run, dict[str, Any]]


class Bench:
    """A network, its images and what it says of them in float."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.memory = options.memory
        self.name = options.model
        self.reader = pack()
        net, card = self.reader.load_model(options.model)
        if options.model == CIFAR:
            train, self.test = (
                TensorDataset(self.reader.cifar_tensor(pixels, card), torch.from_numpy(labels))
                for pixels, labels in (self.reader.cifar10("train"), self.reader.cifar10("test"))
            )
        else:
            names, folder = ("calib_ilsvrc_train", "val_nips17_ccby"), options.out.parent
            train, self.test = (decoded(self.reader, name, card, folder) for name in names)
        self.train = TensorDataset(*(tensor[: options.images] for tensor in train.tensors))
        self.reference = self.logits(net)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Output on the test images."""
        return torch.cat([model.eval()(images) for images, _ in DataLoader(self.test, 100)])

    def score(self, model: nn.Module) -> dict[str, Any]:
        """Top-1 in percent; KL divergence to the float network, in nats."""
        found, target = self.logits(model).log_softmax(1), self.reference.log_softmax(1)
        top1 = 100 * float((found.argmax(1) == self.test.tensors[1]).float().mean())
        return {"top1": top1, "kl": float((target.exp() * (target - found)).sum(1).mean())}

    def run(self, run: Run) -> dict[str, Any]:
        """Quantize and reconstruct, as a user would."""
        module = Classifier(self.reader.load_model(self.name)[0])
        if run.method == "float":
            return self.score(module)
        L.seed_everything(run.seed, verbose=False)
        made = callbacks(run, self.memory)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
        trainer = L.Trainer(accelerator="cpu", max_epochs=0, callbacks=made, **quiet)  # type: ignore[arg-type]
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.fit(module, DataLoader(self.train, batch_size=32))
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        done = [c.reconstruction for c in made if isinstance(c, Reconstruct) and c.reconstruction is not None]
        units = [[[u.name, u.before, u.after, u.iterations, u.seconds] for u in found.units] for found in done]
        return self.score(module) | seconds | {"units": units}


def decoded(reader: Any, name: str, card: Any, folder: Path) -> TensorDataset:
    """All images of a set, decoded once, and their labels."""
    path = folder / f"{name}_{card['input_size']}.pt"
    mean, std = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
    if not path.exists():
        images, labels = zip(*reader.ImageSet(name, card), strict=True)
        pixels = torch.stack([((image * std + mean) * 255).round().byte() for image in images])
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{time.time_ns()}")
        torch.save((pixels, torch.tensor(labels)), partial)
        partial.replace(path)  # another process may be at it too
    pixels, labels = torch.load(path)
    return TensorDataset((pixels.float() / 255 - mean) / std, labels)


def callbacks(run: Run, memory: str) -> list[Any]:
    """What a user would list: a recipe at other widths."""
    more: dict[str, Any] = {} if run.method in WITHOUT_SEED else {"seed": run.seed, "memory": memory}
    made = lq.recipe(
        RECIPES.get(run.method, run.method),
        weights=run.weights,
        activations=run.activations,
        symmetric=False,
        skip=run.skip,
        **more,
    )
    if run.method in WITHOUT_SEED:
        return made[:1] if run.method == "nearest" else made
    stages = [callback for callback in made if isinstance(callback, Reconstruct)]
    share = run.iterations / stages[0].iterations
    for stage in stages:
        stage.iterations = max(1, round(stage.iterations * share))
        stage.search_iterations = min(stage.search_iterations, stage.iterations)
    if run.method == "brecq_fisher":
        stages[0].loss = "fisher"
    if run.method == "qdrop_feedback":
        stages[0].start = "feedback"
    return made


def runs_of(options: argparse.Namespace) -> list[Run]:
    """The float network, then every method with its seeds at every width."""
    found = [Run(options.model, "float", 32, 32, 0, 0, options.images)]
    for widths in options.widths:
        for method in options.methods:
            iterations = 0 if method in WITHOUT_SEED else options.iterations
            if method == "nwq":
                iterations = options.nwq_iterations or CIFAR_UNITS * iterations
            for seed in options.seeds[:1] if method in WITHOUT_SEED else options.seeds:
                rest = (seed, iterations, options.images)
                found.append(Run(options.model, method, widths[0], widths[1], *rest))
    return found


def read(path: Path) -> Results:
    """Every result that is there."""
    return {Run(**row["run"]): row["result"] for row in rows(path)}


def work(runs: list[Run], options: argparse.Namespace) -> Results:
    """Do what is not there yet."""
    bench: Bench | None = None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        if run in read(options.out):
            continue
        bench = bench or Bench(options)
        result = bench.run(run)
        append(options.out, {"run": asdict(run), "result": result})
        seconds = f"{result.get('seconds', 0.0):8.1f} s"
        print(f"  {number:3}/{len(runs)}  {run!s:56} {result['top1']:6.2f}  {result['kl']:8.4f} {seconds}", flush=True)
    return read(options.out)


def table(options: argparse.Namespace) -> None:
    """Methods and widths."""
    runs = runs_of(options)
    if not options.show:
        work(runs, options)
    show(runs, options)


def show(runs: list[Run], options: argparse.Namespace) -> None:
    """The table, in markdown."""
    there = {run: result for run, result in read(options.out).items() if run in runs}
    whole = there[runs[0]]["top1"] if runs[0] in there else float("nan")
    print(f"{options.model}, {options.images} images, {options.iterations} iterations a unit: top-1 % (KL to float)\n")
    print("| method | " + " | ".join(f"W{w}A{a}" for w, a in options.widths) + " | CPU minutes |")
    print("|---" * (len(options.widths) + 2) + "|")
    print("| float | " + f"{whole:.2f} | " * len(options.widths) + "- |")
    for method in options.methods:
        mine = {run: result for run, result in there.items() if run.method == method}
        cells = []
        for widths in options.widths:
            chosen = [result for run, result in mine.items() if (run.weights, run.activations) == widths]
            top1, kl = ([result[key] for result in chosen] for key in ("top1", "kl"))
            cells.append(f"{spread(top1, 2)} ({spread(kl, 4)})" if chosen else "-")
        minutes = spread([result["cpu_seconds"] / 60 for result in mine.values()][:1], 1) if mine else "-"
        print(f"| {method} | " + " | ".join(cells) + f" | {minutes} |")


def oscillation(options: argparse.Namespace) -> None:
    """The loss where each unit ends, by depth: layers, blocks and mixed units."""
    from matplotlib.figure import Figure

    runs = runs_of(options)[1:]
    there = work(runs, options)
    titles = {"adaround": "layers (AdaRound)", "brecq": "blocks (BRECQ)", "mrecg_modcap": "mixed units (MRECG)"}
    figure = Figure(figsize=(5 * len(options.widths), 4), layout="constrained")
    for axes, (weights, activations) in zip(
        figure.subplots(1, len(options.widths), squeeze=False)[0], options.widths, strict=True
    ):
        chosen = {run.method: run for run in runs if (run.weights, run.activations) == (weights, activations)}
        layers = [unit[0].split("+")[0] for unit in there[chosen["adaround"]]["units"][0]]
        for method, run in chosen.items():
            places, losses = [], []
            for name, _, after, *_ in there[run]["units"][0]:
                inside = tuple(f"{part}." for part in name.split("+"))
                places.append(max(i for i, layer in enumerate(layers) if f"{layer}.".startswith(inside)))
                losses.append(after)
            axes.plot(places, losses, "o-", label=titles[method])
            print(f"W{weights}A{activations} {titles[method]}: " + " ".join(f"{loss:.4g}" for loss in losses))
        axes.set_xticks(range(len(layers)), [name.removeprefix("net.") for name in layers], rotation=90, fontsize=6)
        axes.set(yscale="log", title=f"W{weights}A{activations}", ylabel="reconstruction loss")
        axes.legend()
    save(figure, options.plot)


def save(figure: Any, path: Path) -> None:
    """Write a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"saved {path}")
