"""Losses, roundings and starts of reconstruction on a vision transformer, one run, the same images for all.

Attention products stay float, so that what differs is the reconstruction of blocks. The model and images are read from
the folder in the environment variable LQ_DATA (its pack.py); test labels are for reporting only.

    python examples/benchmarks/reconstruction_losses.py
    python examples/benchmarks/reconstruction_losses.py --runs mse,adaround mse,ste --iterations 100

A run is a loss, a rounding and, if it is not "float", a start: "aph,adaround", "mse,ste,feedback". "nearest" is what
they start from. CPU seconds are those of reconstruction alone, on one thread.
"""

import argparse
import copy
import os
import runpy
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import lq
from lq.reconstruction import APHLoss, DPLRLoss
from lq.structure.outputs import kl_divergence

RUNS = ("mse,adaround", "aph,adaround", "dplr,adaround", "global,adaround", "mse,ste")


def load(name: str, images: int, tests: int) -> tuple[nn.Module, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The network, calibration images, and labelled images of the test set; both in batches."""
    pack = runpy.run_path(str(Path(os.environ["LQ_DATA"]) / "pack.py"))
    net, card = pack["load_model"](name)
    calibration = Subset(pack["ImageSet"]("calib_ilsvrc_train", card), range(images))
    every = pack["ImageSet"]("val_nips17_ccby", card)
    test = Subset(every, range(0, len(every), max(1, len(every) // tests)))
    return net, [x for x, _ in DataLoader(calibration, 32)], list(DataLoader(test, 50))


@torch.no_grad()
def score(net: nn.Module, test: Iterable[tuple[Tensor, Tensor]], floats: Sequence[Tensor]) -> tuple[float, float]:
    """Top-1 in percent, and the KL divergence to the float network."""
    outputs = [(net(x), y, z) for (x, y), z in zip(test, floats, strict=True)]
    count = sum(len(y) for _, y, _ in outputs)
    hits = sum(int((output.argmax(1) == y).sum()) for output, y, _ in outputs)
    divergence = sum(float(kl_divergence(output, z)) * len(z) for output, _, z in outputs)
    return 100 * hits / count, divergence / count


def loss_of(name: str, samples: int | None) -> Any:
    """A loss by name, which looks at the network on some samples."""
    looking = {"aph": APHLoss, "dplr": DPLRLoss}
    return looking[name](samples=samples) if name in looking else name


def main(arguments: Sequence[str] | None = None) -> list[tuple[str, float, float, float]]:
    """Run all and print a line for each: what, top-1, KL, CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="LOSS,ROUNDING[,START]")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=50, help="of a block")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--drop", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--looks", type=int, help="images on which aph and dplr look at the network; by default all")
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    net, calibration, test = load(options.model, options.images, options.tests)
    with torch.no_grad():
        floats = [net(x) for x, _ in test]
    lines = [("float", *score(net, test, floats), 0.0)]
    structure = lq.inspect(net, calibration[0][:1])
    lq.attach(
        net,
        options.weights,
        options.activations,
        structure=structure,
        symmetric=False,
        skip="auto",
        exclude=["*.attn.matmul_*"],
    )
    lq.calibrate(net, calibration)
    print(_line(lines[0]), flush=True)
    for run in ("nearest", *options.runs):
        model, begin = copy.deepcopy(net), time.process_time()
        if run != "nearest":
            loss, rounding, *start = run.split(",")
            lq.reconstruct(
                model,
                calibration,
                loss=loss_of(loss, options.looks),
                rounding=rounding,
                start=start[0] if start else "float",
                iterations=options.iterations,
                batch_size=options.batch_size,
                drop=options.drop,
                seed=options.seed,
            )
        seconds = time.process_time() - begin
        lines.append((run, *score(model, test, floats), seconds))
        print(_line(lines[-1]), flush=True)
    return lines


def _line(line: tuple[str, float, float, float]) -> str:
    name, top1, divergence, seconds = line
    return f"| {name} | {top1:.1f} | {divergence:.3f} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
