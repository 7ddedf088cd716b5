"""Post-training quantization of a vision transformer, step by step: what each brings, and its seconds.

Real models and images are read from the folder in the environment variable LQ_DATA (its pack.py). Everything is
quantized, attention too; ``--first-last 0`` puts the first and last layers at the width of the others.

    python examples/benchmarks/transformers.py --weights 4 --activations 4
    python examples/benchmarks/transformers.py --weights 4 --activations 8 --losses relative --iterations 150
    python examples/benchmarks/transformers.py --weights 8 --activations 8 --outliers 16 --steps nearest --losses
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lq
from real_data import Batches, load

#: Preparation, range rule, levels of probabilities and behind GELUs of each row; all before reconstruction.
STEPS: dict[str, tuple[dict[str, Any] | None, str, str, str]] = {
    "nearest": (None, "auto", "uniform", "uniform"),
    "log2": (None, "auto", "log2", "uniform"),
    "log2, log": (None, "auto", "log2", "log"),
    "by output": (None, "output", "uniform", "uniform"),
    "by output, log2": (None, "output", "log2", "uniform"),
    "prepared": ({}, "auto", "uniform", "uniform"),
    "prepared, log2": ({}, "auto", "log2", "uniform"),
    "prepared, log2, log": ({}, "auto", "log2", "log"),
    "prepared, by output": ({}, "output", "uniform", "uniform"),
    "prepared, by output, log2": ({}, "output", "log2", "uniform"),
    "rotated, by output": ({"rotate": True}, "output", "uniform", "uniform"),
    "rotated, log2, log": ({"rotate": True}, "auto", "log2", "log"),
}


def main() -> None:
    """Print a row for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=4)
    parser.add_argument("--first-last", type=int, default=8, help="least width of the first and last layers; 0: none")
    parser.add_argument("--outliers", type=int, help="width of activations with outliers")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--iterations", type=int, default=150, help="of reconstruction, a block")
    parser.add_argument("--losses", nargs="*", default=["relative"], help="of reconstruction; none: without it")
    parser.add_argument("--rounding", nargs="*", default=["adaround"])
    parser.add_argument("--bias-lr", type=float, default=0.0, help="of reconstruction")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), help=f"some of: {', '.join(map(repr, STEPS))}")
    parser.add_argument("--from-step", choices=STEPS, default="prepared, log2, log", help="reconstruction starts there")
    given = parser.parse_args()
    net, train, test = load(given.model, given.images)
    batches, test = [x for x, _ in train], test[: -(-given.test // len(test[0][0]))]
    print(f"{given.model}, W{given.weights}A{given.activations}, {len(batches) * len(batches[0])} images, ", end="")
    print(f"{sum(len(x) for x, _ in test)} test images, {torch.get_num_threads()} threads")
    print(f"{'float':57} {top1(net, test):6.1f} %", flush=True)
    for name, change, seconds, accuracy in rows(net, batches, test, given):
        print(f"{name:32} {change:24} {accuracy:6.1f} % {seconds:8.1f} s", flush=True)


def rows(
    net: nn.Module, batches: Sequence[Tensor], test: Batches, given: argparse.Namespace
) -> Iterator[tuple[str, str, float, float]]:
    """Name, method, seconds and accuracy of each step."""
    for name in given.steps:
        begin = time.perf_counter()
        model = quantized(net, batches, given, name)
        yield name, "-", time.perf_counter() - begin, top1(model, test)
    for loss in given.losses:
        for rounding in given.rounding:
            begin = time.perf_counter()
            model = quantized(net, batches, given, given.from_step)
            lq.reconstruct(
                model,
                batches,
                units="block",
                rounding=rounding,
                loss=loss,
                drop=0.0 if rounding == "ste" else 0.5,
                iterations=given.iterations,
                bias_lr=given.bias_lr,
            )
            yield given.from_step, f"{loss}, {rounding}", time.perf_counter() - begin, top1(model, test)


def quantized(net: nn.Module, batches: Sequence[Tensor], given: argparse.Namespace, step: str) -> nn.Module:
    """A quantized, calibrated copy."""
    model = copy.deepcopy(net)
    prepare, rule, probabilities, gelu = STEPS[step]
    if prepare is not None:
        lq.prepare(model, batches, weights=given.weights, activations=given.activations, **prepare)
    options: dict[str, Any] = {"symmetric": False, "first_last": given.first_last or None, "range": rule}
    options |= {"probabilities": probabilities, "gelu": gelu, "outliers": given.outliers}
    lq.attach(model, given.weights, given.activations, structure=lq.inspect(model, batches[0][:1]), **options)
    return lq.calibrate(model, batches)


@torch.no_grad()
def top1(model: nn.Module, test: Batches) -> float:
    """Accuracy in percent."""
    right = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in test)
    return 100 * right / sum(len(y) for _, y in test)


if __name__ == "__main__":
    main()
