r"""What reconstruction brings at few bits, and what it costs beside other tools and QDrop's published code.

Every part is a comparison within one run; ratios count, absolute times do not. Real models and images are read from the
folder in the environment variable LQ_DATA or in --data (its pack.py). Test labels are for reporting only.

    python examples/benchmarks/reconstruction.py table                # ResNet-20, all methods; resumes where it stopped
    python examples/benchmarks/reconstruction.py table --show         # the table of what is there
    python examples/benchmarks/reconstruction.py imagenet --model vit_tiny_patch16_224
    python examples/benchmarks/reconstruction.py speed --aimet PYTHON --brevitas PYTHON
    python examples/benchmarks/reconstruction.py speed --aimet PYTHON --brevitas PYTHON \
        --model tf_efficientnet_lite0 --images 128 --layers 6
    python examples/benchmarks/reconstruction.py qdrop --code DIR --python PYTHON
    python examples/benchmarks/reconstruction.py depth                # seconds of a unit, by its position
    python examples/benchmarks/reconstruction.py memory               # peak of captured activations, against the limit
    python examples/benchmarks/reconstruction.py oscillation          # losses by unit: layers, blocks, mixed units

PYTHON is the interpreter of an environment with the other tool (see reconstruction_peers.py), DIR a checkout of
QDrop's repository. Each finished run of a table is a line of outputs/reconstruction/table.jsonl; to run it again,
remove the line.
"""

import argparse
import json
import logging
import os
import runpy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import Reconstruct
from lq.reconstruction.storage import memory_in_bytes

CIFAR = "cifar10_resnet20"
CIFAR_UNITS = 11  # stem, 9 blocks, classifier
PUBLISHED = ("lapq", "adaround", "brecq", "brecq_fisher", "qdrop", "mrecg_modcap", "mrecg_loss", "nwq")
METHODS = ("nearest", *PUBLISHED, "best_ptq")
RECIPES = {"nearest": "qdrop", "brecq_fisher": "brecq", "qdrop_feedback": "qdrop"}
WITHOUT_SEED = ("nearest", "lapq")  # and without iterations
OUTPUT = Path("outputs/reconstruction")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# memory that is freed stays with the process: else page faults are half of what is measured
HEAP = {"MMAP_THRESHOLD": "4000000000", "TRIM_THRESHOLD": "16000000000", "TOP_PAD": "268435456"}
ONE_HEAP = {f"MALLOC_{key}_": value for key, value in HEAP.items()}
STAGES = ("ranges", "reconstruction")


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


# --- runs ------------------------------------------------------------------------------------------------------------


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
        self.reader = runpy.run_path(str(Path(__file__).with_name("allocation.py")))["pack"]()
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
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Run(**row["run"]): row["result"] for row in map(json.loads, lines)}


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


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file of JSON objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


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


def spread(values: list[float], digits: int) -> str:
    """Mean, and the standard deviation if there are several."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


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


# --- other tools -----------------------------------------------------------------------------------------------------


def measured(python: str | Path, tool: str, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What `reconstruction_peers.py` finds in the environment of `python`, on one thread."""
    given = {"images": options.images, "iterations": options.iterations, "seed": options.seed, **more}
    command = [str(python), str(Path(__file__).with_name("reconstruction_peers.py")), tool]
    command += [f"--{key}={value}" for key, value in given.items()]
    environment = {**os.environ, **ONE_THREAD, **ONE_HEAP}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    append(options.out, {"tool": tool, **given, **found})
    return found


def compared(rows: Iterable[tuple[str, dict[str, Any]]], iterations: int) -> None:
    """Print results as they come; the first is lq's, and ratios are those of the process's CPU seconds to it."""
    titles = (
        "ranges, s",
        "fitting, s",
        "all, CPU s",
        "steps/s",
        "nearest, %",
        "top-1, %",
        "ranges/lq",
        "fitting/lq",
        "all/lq",
    )
    print(" " * 16 + "".join(f"{title:>12}" for title in titles))
    ours: dict[str, Any] | None = None
    for name, found in rows:
        ours = ours or found
        ratios = [found[f"{stage}_cpu"] / ours[f"{stage}_cpu"] for stage in STAGES]
        ratios.append(sum(found[f"{stage}_cpu"] for stage in STAGES) / sum(ours[f"{stage}_cpu"] for stage in STAGES))
        rate = found["units"] * iterations / found["reconstruction"]
        cells = [*(found[stage] for stage in STAGES), sum(found[f"{stage}_cpu"] for stage in STAGES), rate]
        cells += [found.get(key, float("nan")) for key in ("nearest", "top1")]
        print(f"  {name:14}" + "".join(f"{cell:12.2f}" for cell in [*cells, *ratios]), flush=True)


def speed(options: argparse.Namespace) -> None:
    """AdaRound of lq, AIMET and Brevitas, one after the other."""
    more = {"model": options.model, "layers": options.layers, "weights": 4, "activations": 8}
    tools = {"lq_adaround": sys.executable, "aimet": options.aimet, "brevitas": options.brevitas}
    what = f"the first {options.layers} layers" if options.layers else "all layers"
    print(f"{options.model}, AdaRound of {what}, {options.images} images, {options.iterations} iterations, W4A8")
    rows = ((tool, measured(python, tool, options, **more)) for tool, python in tools.items() if python)
    compared(rows, options.iterations)


def qdrop(options: argparse.Namespace) -> None:
    """QDrop's published code and lq."""
    for weights, activations in options.widths:
        print(f"{CIFAR}, QDrop W{weights}A{activations}, {options.images} images, {options.iterations} iterations")
        more = {"weights": weights, "activations": activations}
        jobs: list[tuple[str, Any, dict[str, Any]]] = [("lq_qdrop", sys.executable, {})]
        if options.python:
            jobs.append(("qdrop", options.python, {"code": options.code}))
        rows = ((tool, measured(python, tool, options, **more, **extra)) for tool, python, extra in jobs)
        compared(rows, options.iterations)


# --- cost ------------------------------------------------------------------------------------------------------------


def depth(options: argparse.Namespace) -> None:
    """Seconds of each unit of a deep transformer: capturing must not take longer the deeper a unit lies."""
    from matplotlib.figure import Figure
    from timm.models import VisionTransformer

    net = VisionTransformer(64, 8, embed_dim=192, depth=options.blocks, num_heads=3, num_classes=10).eval()
    batches = list(torch.randn(options.images, 3, 64, 64).split(32))
    lq.attach(net, 4, 4, structure=lq.inspect(net, batches[0][:2]), skip=True, symmetric=False)
    lq.calibrate(net, batches[:2])
    steps: dict[str, float] = {}

    def watch(iterations: Iterable[int], name: str) -> Iterator[int]:
        start = time.perf_counter()
        yield from iterations
        steps[name] = time.perf_counter() - start

    found = lq.reconstruct(net, batches, iterations=options.iterations, watch=watch)
    blocks = [unit for unit in found.units if unit.name.startswith("blocks.")]
    fit = [steps[unit.name] for unit in blocks]
    rest = [unit.seconds - seconds for unit, seconds in zip(blocks, fit, strict=True)]
    whole = [unit.seconds for unit in blocks]
    some = max(1, len(blocks) // 4)
    for title, seconds in (("steps", fit), ("capture, ranges and losses", rest), ("all", whole)):
        ratio = statistics.mean(seconds[-some:]) / statistics.mean(seconds[:some])
        print(f"{title:28} last {some} / first {some} blocks: {ratio:.2f}   " + " ".join(f"{s:.2f}" for s in seconds))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for title, seconds in (("steps", fit), ("capture, ranges and losses", rest)):
        axes.plot(seconds, "o-", label=title)
    axes.set(xlabel="block", ylabel="seconds", ylim=(0, None))
    axes.legend()
    save(figure, options.plot)


def memory(options: argparse.Namespace) -> None:
    """Growth of a process while it captures more than the limit, less that of few images, kept in files."""
    print(f"{options.model}, {options.images} random images of 224 px, memory={options.memory!r}")
    command = [sys.executable, __file__, "memory-worker", f"--model={options.model}", f"--units={options.units}"]
    command += [f"--iterations={options.iterations}"]
    grown = []
    for more in (["--images=64", "--memory=1B"], [f"--images={options.images}", f"--memory={options.memory}"]):
        environment = {**os.environ, **ONE_THREAD}
        done = subprocess.run([*command, *more], env=environment, check=True, stdout=subprocess.PIPE, text=True)
        grown.append(json.loads(done.stdout.splitlines()[-1]))
    limit = memory_in_bytes(options.memory)
    print("GB of peak growth until the end of a unit: with 64 images in files, with all; difference, of the limit")
    for (name, few), (_, whole) in zip(*grown, strict=True):
        print(
            f"  {name:32} {few / 1e9:6.2f} {whole / 1e9:6.2f} {(whole - few) / 1e9:6.2f}  {(whole - few) / limit:5.2f}"
        )


class Enough(Exception):  # noqa: N818 - not an error: it ends a reconstruction that has come far enough
    """As many units as asked for are done."""


def memory_worker(options: argparse.Namespace) -> None:
    """The process that `memory` measures."""
    import timm

    net = timm.create_model(options.model).eval()
    lq.fold_batchnorm(net)
    example = torch.randn(8, 3, 224, 224)
    lq.attach(net, 4, 4, structure=lq.inspect(net, example[:2]), skip=True, symmetric=False)
    lq.calibrate(net, [example])
    peaks: list[tuple[str, int]] = []

    def watch(iterations: Iterable[int], name: str) -> Iterator[int]:
        if len(peaks) == options.units:
            raise Enough
        yield from iterations
        peaks.append((name, status("VmHWM")))

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = status("VmRSS")
    sizes = [32] * (options.images // 32) + [options.images % 32] * (options.images % 32 > 0)
    batches = (torch.randn(size, 3, 224, 224) for size in sizes)
    with suppress(Enough):
        lq.reconstruct(net, batches, iterations=options.iterations, memory=options.memory, watch=watch)
    print(json.dumps([(name, peak - start) for name, peak in peaks]))


def status(key: str) -> int:
    """Bytes of a line of Linux' account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


# --- command line ----------------------------------------------------------------------------------------------------


def two(text: str) -> tuple[int, int]:
    """Widths of weights and activations, such as 24."""
    if len(text) != 2 or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: give two digits, such as 24 for W2A4")
    return int(text[0]), int(text[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", help="folder with real weights and images; by default LQ_DATA")
    common.add_argument("--threads", type=int, default=1)
    common.add_argument("--seed", type=int, default=0)
    parts = parser.add_subparsers(dest="command", required=True)

    def part(name: str, run: Any, iterations: int, images: int, out: str = "table.jsonl") -> argparse.ArgumentParser:
        made = parts.add_parser(name, parents=[common], help=run.__doc__)
        made.set_defaults(run=run)
        made.add_argument("--iterations", type=int, default=iterations, help="steps for a unit")
        made.add_argument("--images", type=int, default=images)
        made.add_argument("--out", type=Path, default=OUTPUT / out, help="results, a JSON object a line")
        return made

    for name, run, iterations, images, widths, methods in (
        ("table", table, 2000, 1024, ["44", "33", "24", "22"], METHODS),
        ("imagenet", table, 300, 512, ["48", "44"], ("nearest", "qdrop", "mrecg_modcap", "best_ptq")),
        ("oscillation", oscillation, 2000, 1024, ["44"], ("adaround", "brecq", "mrecg_modcap")),
    ):
        one = part(name, run, iterations, images)
        one.add_argument("--widths", nargs="+", type=two, default=[two(text) for text in widths])
        one.add_argument("--seeds", nargs="+", type=int, default=[0])
        one.add_argument("--memory", default="4GB", help="limit for captured activations")
        one.add_argument("--nwq-iterations", type=int, help=f"of all units together; by default {CIFAR_UNITS} times")
        one.set_defaults(methods=methods, model=CIFAR)
        if name == "oscillation":
            one.add_argument("--plot", type=Path, default=OUTPUT / "oscillation.png")
            continue
        one.add_argument("--methods", nargs="+", default=methods, metavar="METHOD", help=", ".join(METHODS))
        one.add_argument("--show", action="store_true", help="only print what is there")
    parts.choices["imagenet"].add_argument("--model", default="tf_efficientnet_lite0")
    one = part("speed", speed, 200, 1024, "speed.jsonl")
    one.add_argument("--model", default=CIFAR)
    one.add_argument("--layers", type=int, default=0, help="only the first layers; 0: all")
    one.add_argument("--aimet", metavar="PYTHON")
    one.add_argument("--brevitas", metavar="PYTHON")
    one = part("qdrop", qdrop, 200, 1024, "speed.jsonl")
    one.add_argument("--code", metavar="DIR")
    one.add_argument("--python", metavar="PYTHON")
    one.add_argument("--widths", nargs="+", type=two, default=[(2, 2), (4, 4)])
    one = part("depth", depth, 50, 256)
    one.add_argument("--blocks", type=int, default=24)
    one.add_argument("--plot", type=Path, default=OUTPUT / "depth.png")
    for name, run in (("memory", memory), ("memory-worker", memory_worker)):
        one = part(name, run, 5, 1024)
        one.add_argument("--model", default="tf_efficientnet_lite0")
        one.add_argument("--memory", default="1GB")
        one.add_argument("--units", type=int, default=3, help="how many of the first units")
    options = parser.parse_args(arguments)
    wanted = {RECIPES.get(method, method) for method in getattr(options, "methods", ())}
    if unknown := sorted(wanted - {*lq.recipe_names()}):
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(lq.recipe_names())}")
    if options.command == "imagenet" and "nwq" in wanted and options.nwq_iterations is None:
        parser.error("nwq reconstructs the whole network at once: give --nwq-iterations")
    if options.command == "qdrop" and (options.python is None) != (options.code is None):
        parser.error("QDrop's code needs both --code and --python")
    if options.data is not None:
        os.environ["LQ_DATA"] = options.data
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    options.run(options)


if __name__ == "__main__":
    main()
