"""What quantization costs on a GPU: steps of training, reconstruction, sensitivity of a large transformer, memory.

- Steps: forward, backward and SGD of resnet50 and vit_small (64 images of 224 px each), W4A4 by LSQ, against float, in
  float32 and under bfloat16 autocast; eager, eager without the fused kernels, and compiled. Variants take turns; the
  ratio is the median over rounds. Memory is the peak that the allocator has seen over what the model takes at rest.
- Reconstruction: iterations a second of lq.reconstruct on resnet18 and vit_tiny, blocks, batches of 32.
- Sensitivity: one pass (every width of every tensor) over 32 images of a ViT of 300 M parameters, against forward and
  backward of the same images, with its peak of memory.

One command, a few minutes on a GPU of 40 GB; it has not been run on one. With --device cpu --tiny it tries its own
code on small networks; those figures mean nothing.

    python examples/benchmarks/gpu.py --json gpu.json
    python examples/benchmarks/gpu.py --device cpu --tiny
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.quantizer import kernels

Figures = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is measured: networks, images and how often."""

    steps: tuple[str, ...] = ("resnet50", "vit_small_patch16_224")
    reconstruction: tuple[str, ...] = ("resnet18", "vit_tiny_patch16_224")
    large: str = "vit_large_patch16_224"  # 304 M parameters
    size: int = 224
    batch: int = 64
    rounds: int = 20
    iterations: int = 200
    samples: int = 256
    images: int = 32
    compiled: bool = True


TINY = Work(("test_resnet",), ("test_resnet",), "test_vit", 160, 4, 2, 4, 8, 4, False)


class Device:
    """Times and memory of a device, which is waited for where a clock is read."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        """Until all that was asked for is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        """What a call takes."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def megabytes(self, function: Callable[[], object]) -> float:
        """What a call takes above what was there, at its peak; NaN on the CPU, where nobody counts."""
        if not self.is_gpu:
            function()
            return float("nan")
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def forget(self) -> None:
        """Give back what is not used any more."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def without_kernels() -> contextlib.AbstractContextManager[Any]:
    """Operations of torch instead of the fused kernels."""
    return mock.patch.object(kernels, "on_gpu", new=_nowhere)


def _nowhere(_: torch.Tensor) -> bool:
    return False


def network(name: str, size: int) -> nn.Module:
    """A timm model with random weights, none of them zero."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"zero_init_last": False} if name.startswith("resnet") else {"img_size": size}
    if name.startswith("test_resnet"):
        options = {}
    model: nn.Module = timm.create_model(name, **options)
    return model


def quantized(model: nn.Module, images: torch.Tensor, estimator: str = "lsq", weights: int = 4) -> nn.Module:
    """Its W4A4 copy, calibrated."""
    model = copy.deepcopy(model).eval()
    lq.attach(model, weights, 4, estimator=estimator)
    lq.calibrate(model, [images])
    return model


def stepper(
    model: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    half: bool,
) -> Callable[[], None]:
    """One training step of a model, or of what was compiled of it."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(name: str, half: bool, work: Work, device: Device) -> Figures:
    """Milliseconds and megabytes of a step, by variant."""
    images = torch.randn(work.batch, 3, work.size, work.size, device=device.device)
    labels = torch.randint(0, 1000, (work.batch,), device=device.device)
    plain = network(name, work.size).to(device.device)
    steps: dict[str, Callable[[], None]] = {}
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {}
    for variant in ("float", "lq", "lq, no kernels", *(("float, compiled", "lq, compiled") if work.compiled else ())):
        model = copy.deepcopy(plain) if variant.startswith("float") else quantized(plain, images)
        run: Any = torch.compile(model) if variant.endswith("compiled") else model
        steps[variant] = stepper(model, run, images, labels, half)
        contexts[variant] = without_kernels if variant.endswith("no kernels") else contextlib.nullcontext
    memory: dict[str, float] = {}
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for variant, step in steps.items():
        with contexts[variant]():
            for _ in range(3):
                step()
            memory[variant] = device.megabytes(step)
    for _ in range(work.rounds):
        for variant, step in steps.items():
            with contexts[variant]():
                seconds[variant].append(device.seconds(step))
    found: Figures = {}
    for variant in steps:
        base = "float, compiled" if variant.endswith("compiled") else "float"
        ratios = [mine / other for mine, other in zip(seconds[variant], seconds[base], strict=True)]
        found[variant] = {
            "milliseconds": 1e3 * statistics.median(seconds[variant]),
            "ratio": statistics.median(ratios),
            "megabytes": memory[variant],
        }
    return found


def measure_reconstruction(name: str, work: Work, device: Device) -> Figures:
    """Iterations a second, of a difference of two runs: what is done once does not count."""
    data = [torch.randn(32, 3, work.size, work.size, device=device.device) for _ in range(max(work.samples // 32, 1))]
    data = [batch[: work.samples] for batch in data]
    plain = network(name, work.size).to(device.device)
    seconds, iterations = [], (work.iterations, 3 * work.iterations)
    units = 0
    for count in (work.iterations, *iterations):  # the first is a trial: libraries are loaded
        model = copy.deepcopy(plain).eval()
        lq.fold_batchnorm(model)
        model = quantized(model, data[0], "ste")
        found: list[Any] = []

        def run(model: nn.Module = model, count: int = count, found: list[Any] = found) -> None:
            found.append(lq.reconstruct(model, data, iterations=count))

        seconds.append(device.seconds(run))
        units = len(found[0].units)
    between = seconds[2] - seconds[1]
    rate = units * (iterations[1] - iterations[0]) / between if between > 0 else float("nan")
    return {"iterations_a_second": rate, "units": units, "seconds": seconds[1]}


def measure_sensitivity(work: Work, device: Device) -> Figures:
    """Seconds and megabytes of one pass, and of forward and backward alone."""
    model = network(work.large, work.size).to(device.device)
    parameters = sum(p.numel() for p in model.parameters())
    images = torch.randn(work.images, 3, work.size, work.size, device=device.device)
    labels = torch.randint(0, 1000, (work.images,), device=device.device)
    batches = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, work.images, 8)]
    model.eval()

    def plain() -> None:
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            model.zero_grad()

    plain()
    found: Figures = {"parameters": parameters, "plain_seconds": device.seconds(plain)}
    found["plain_megabytes"] = device.megabytes(plain)
    lq.attach(model, 4, 4)
    found["calibration_seconds"] = device.seconds(lambda: lq.calibrate(model, [x for x, _ in batches]))
    device.forget()
    timed: list[float] = []
    found["megabytes"] = device.megabytes(
        lambda: timed.append(device.seconds(lambda: lq.measure_sensitivity(model, batches)))
    )
    found["seconds"] = timed[0]
    return found


def main(arguments: list[str] | None = None) -> Figures:
    """Measure, print and return all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks: tries the code, the figures mean nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args(arguments)
    device, work = Device(options.device), TINY if options.tiny else Work()
    if device.is_gpu and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --device cpu --tiny tries the code")
    found: Figures = {"torch": torch.__version__, "device": options.device}
    if device.is_gpu:
        found |= {
            "device": torch.cuda.get_device_name(),
            "kernels": kernels.proven(torch.zeros(1, device="cuda").device),
        }
    print(json.dumps(found))
    for part in options.parts:
        found[part] = PARTS[part](work, device)
        if options.json:  # what was measured before something fails is kept
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=2)
    return found


def steps_part(work: Work, device: Device) -> Figures:
    """All networks, in float32 and with autocast."""
    found: Figures = {}
    print(f"{'network':24} {'precision':9} {'variant':16} {'ms':>9} {'/ float':>8} {'MB':>8}")
    for name in work.steps:
        for half in (False, True):
            label = "bfloat16" if half else "float32"
            found[f"{name}, {label}"] = rows = measure_steps(name, half, work, device)
            for variant, row in rows.items():
                print(
                    f"{name:24} {label:9} {variant:16} {row['milliseconds']:9.2f} {row['ratio']:8.3f} "
                    f"{row['megabytes']:8.0f}"
                )
            device.forget()
            torch._dynamo.reset()
    return found


def reconstruction_part(work: Work, device: Device) -> Figures:
    """All networks."""
    found: Figures = {}
    for name in work.reconstruction:
        found[name] = row = measure_reconstruction(name, work, device)
        print(f"reconstruction of {name}: {row['iterations_a_second']:.0f} iterations/s in {row['units']} units")
        device.forget()
    return found


def sensitivity_part(work: Work, device: Device) -> Figures:
    """One network."""
    row = measure_sensitivity(work, device)
    print(
        f"sensitivity of {work.large} ({row['parameters'] / 1e6:.0f} M): {row['seconds']:.2f} s, "
        f"{row['megabytes']:.0f} MB; "
        f"forward and backward alone {row['plain_seconds']:.2f} s, {row['plain_megabytes']:.0f} MB; "
        f"calibration {row['calibration_seconds']:.2f} s"
    )
    return row


PARTS: dict[str, Callable[[Work, Device], Figures]] = {
    "steps": steps_part,
    "reconstruction": reconstruction_part,
    "sensitivity": sensitivity_part,
}

if __name__ == "__main__":
    main()
