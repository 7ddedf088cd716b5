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
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import lq
from benchmark_results import append
from reconstruction_cost import ONE_THREAD, depth, memory, memory_worker
from reconstruction_runs import CIFAR, CIFAR_UNITS, RECIPES, oscillation, table

PUBLISHED = ("lapq", "adaround", "brecq", "brecq_fisher", "qdrop", "mrecg_modcap", "mrecg_loss", "nwq")
METHODS = ("nearest", *PUBLISHED, "best_ptq")
OUTPUT = Path("outputs/reconstruction")
# memory that is freed stays with the process: else page faults are half of what is measured
HEAP = {"MMAP_THRESHOLD": "4000000000", "TRIM_THRESHOLD": "16000000000", "TOP_PAD": "268435456"}
ONE_HEAP = {f"MALLOC_{key}_": value for key, value in HEAP.items()}
STAGES = ("ranges", "reconstruction")


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
