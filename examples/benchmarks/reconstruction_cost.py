"""What reconstruction costs by depth, in seconds, and in memory: `depth` and `memory` of `reconstruction.py`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

import lq
from lq.reconstruction.storage import memory_in_bytes
from reconstruction_runs import save

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def depth(options: argparse.Namespace) -> None:
    """Seconds of each unit of a deep transformer: capturing must not take longer the deeper a unit lies."""
    from matplotlib.figure import Figure
    from timm.models import VisionTransformer

    net = VisionTransformer(64, 8, embed_dim=192, depth=options.blocks, num_heads=3, num_classes=10).eval()
    batches = list(torch.randn(options.images, 3, 64, 64).split(32))
    structure = lq.inspect(net, batches[0][:2])
    lq.attach(model=net, weights=4, activations=4, structure=structure, skip=True, symmetric=False)
    lq.calibrate(net, batches[:2])
    steps: dict[str, float] = {}

    def watch(iterations: Iterable[int], name: str) -> Iterator[int]:
        start = time.perf_counter()
        yield from iterations
        steps[name] = time.perf_counter() - start

    found = lq.reconstruct(model=net, batches=batches, iterations=options.iterations, watch=watch)
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
    script = Path(__file__).with_name("reconstruction.py")
    command = [sys.executable, str(script), "memory-worker", f"--model={options.model}", f"--units={options.units}"]
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
