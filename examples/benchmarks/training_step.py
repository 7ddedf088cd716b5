"""Time one quantized training step of each gradient estimator against the float step: W4A4.

Forward, backward and SGD step on random images: resnet18 at 128 px and vit_tiny at 224 px with a batch of 8, on request
resnet20 at 32 px with a batch of 128. "learned widths" is the noise scale with its widths learned too; "counted" has
oscillations of weights counted, "half frozen" half of the weights frozen for it as well (`lq.training.oscillations`),
"dampened" its loss added. NVIDIA ModelOpt runs beside lq if it is installed. Steps of all variants run in turn in one
process; the ratio is the median over rounds. Memory is the growth of the peak of the process by three steps, each
variant in a process of its own.

    python examples/benchmarks/training_step.py --rounds 20
    python examples/benchmarks/training_step.py --estimators lsq noise_scale
    python examples/benchmarks/training_step.py --models resnet20 --estimators lsq "lsq, counted" "lsq, half frozen"
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import lq
from lq.quantizer.estimators import ESTIMATORS, NoiseScale
from lq.training.dampening import add_dampening
from lq.training.oscillations import OscillationTracker, shares
from lq.training.quantized_weights import quantized_weights

WIDTHS = "learned widths"
WORK: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({"zero_init_last": False}, 128),
    "vit_tiny_patch16_224": ({}, 224),
    "resnet20": ({"num_classes": 1000}, 32),
}
BATCH, BATCHES = 8, {"resnet20": 128}
COUNTED, FROZEN, DAMPENED = "lsq, counted", "lsq, half frozen", "lsq, dampened"


def build(name: str, variant: str) -> nn.Module:
    """The model of one variant: "float", "modelopt", or one of lq's estimators."""
    torch.manual_seed(0)
    options, size = WORK[name]
    model: nn.Module = (resnet20 if name == "resnet20" else partial(timm.create_model, name))(**options).train()
    images = torch.randn(BATCH, 3, size, size)
    if variant == "modelopt":
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        _set_bits(config["quant_cfg"], 4)
        model = mtq.quantize(model, config, lambda m: m(images))
    elif variant != "float":
        estimator = NoiseScale(widths=True) if variant == WIDTHS else variant.partition(",")[0]
        lq.attach(model, weights=4, activations=4, estimator=estimator)
        lq.calibrate(model, [images])
    return model


def resnet20(num_classes: int) -> nn.Module:
    """The network for images of 32 px of He et al., of timm's own blocks."""
    block: Any = BasicBlock
    net: Any = ResNet(block, (3, 3, 3), num_classes=num_classes, channels=(16, 32, 64))
    net.conv1, net.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    net.layer1[0] = BasicBlock(16, 16)
    net.maxpool = net.layer4 = nn.Identity()
    made: nn.Module = net
    return made


def stepper(name: str, model: nn.Module, variant: str = "") -> Callable[[], None]:
    """One training step of the model."""
    size, batch = WORK[name][1], BATCHES.get(name, BATCH)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    weights = quantized_weights(model)
    tracker = OscillationTracker(weights if variant in (COUNTED, FROZEN) else [])
    if variant == FROZEN:
        states = tracker.state()
        for state in states.values():
            state["frozen"].bernoulli_(0.5)
        tracker = OscillationTracker(weights, states=states)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        if variant == DAMPENED:
            add_dampening(weights, 1e-4)
        tracker.take_gradients()
        optimizer.step()
        tracker.step(0.1)
        if variant in (COUNTED, FROZEN):
            shares([tracker])
        optimizer.zero_grad()

    return step


def compare(
    name: str, variants: list[str], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each round's step, by variant; variants take turns."""
    steps = {variant: stepper(name, build(name, variant), variant) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 3):
        for variant, step in steps.items():
            start = clock()
            step()
            if turn >= 3:
                seconds[variant].append(clock() - start)
    return seconds


def peak_memory(name: str, variant: str, threads: int) -> float:
    """Memory that three training steps take above what the model takes at rest, at their peak, in MB (Linux only)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, variant, threads))


def _peak_memory(name: str, variant: str, threads: int) -> float:
    torch.set_num_threads(threads)
    step = stepper(name, build(name, variant), variant)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A figure of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _set_bits(config: Any, bits: int) -> None:
    """Set every width in a ModelOpt configuration."""
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, dict) and isinstance(value.get("num_bits"), int):
            value["num_bits"] = bits
        elif isinstance(value, (dict, list)):
            _set_bits(value, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2)
    known = [*ESTIMATORS, WIDTHS]
    kinds = [*known, COUNTED, FROZEN, DAMPENED]
    parser.add_argument("--estimators", nargs="+", choices=kinds, default=known)
    parser.add_argument("--models", nargs="+", choices=WORK, default=[*WORK][:2])
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where others are at work")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = ["modelopt"] if importlib.util.find_spec("modelopt") else []
    variants = ["float", *options.estimators, *peers]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'model':22} {'variant':16} {'median s':>9} {'/ float':>8} {'step MB':>8}")
    for name in options.models:
        clock = time.process_time if options.cpu_time else time.perf_counter
        seconds = compare(name, variants, options.rounds, clock)
        figures[name] = {}
        for variant in variants:
            ratios = [mine / other for mine, other in zip(seconds[variant], seconds["float"], strict=True)]
            median, ratio = statistics.median(seconds[variant]), statistics.median(ratios)
            memory = peak_memory(name, variant, options.threads)
            figures[name][variant] = {"seconds": median, "ratio": ratio, "megabytes": memory}
            print(f"{name:22} {variant:16} {median:9.4f} {ratio:8.3f} {memory:8.0f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
