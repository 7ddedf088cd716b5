"""What bit allocation costs and what it brings, on real weights and images.

Every part is a comparison within one run; ratios count, absolute times do not. Real models and images are read from the
folder in the environment variable LQ_DATA (its pack.py).

    python examples/benchmarks/allocation.py cost                  # against a training step, per image
    python examples/benchmarks/allocation.py fidelity              # estimates against what really happens
    python examples/benchmarks/allocation.py table --model NAME    # uniform, by layer, by channel at equal bytes
    python examples/benchmarks/allocation.py cross --model NAME    # additive losses and cross terms at equal mean bits
    python examples/benchmarks/allocation.py modelopt              # NVIDIA ModelOpt's gradient auto_quantize beside lq
    python examples/benchmarks/allocation.py finetune              # allocated and uniform widths, fine-tuned
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from allocation_fidelity import fidelity
from lq.allocation.allocate import Granularity
from lq.sensitivity import measure_sensitivity
from lq.sites import quantizers
from real_data import Batches, TensorBatches, load, pack, prepared


class Score:
    """Top-1 and the KL divergence to the float model."""

    def __init__(self, net: nn.Module, test: Batches) -> None:
        self.test = test
        self.labels = torch.cat([y for _, y in test])
        self.float = self._run(net).log_softmax(1)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """Top-1 in percent, KL in nats."""
        found = self._run(model).log_softmax(1)
        top1 = 100 * float((found.argmax(1) == self.labels).float().mean())
        return top1, float((self.float.exp() * (self.float - found)).sum(1).mean())

    @torch.no_grad()
    def _run(self, model: nn.Module) -> Tensor:
        return torch.cat([model.eval()(x) for x, _ in self.test])


def _interleaved(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(names: Sequence[str], rounds: int, images: int = 64, batch: int = 16) -> None:
    """One pass for 8 widths of everything, against forward and backward of plain training over the same images."""
    import timm

    print(f"{'model':24} weights  +activations  with ranges, 512 images  brute force")
    for name in names:
        torch.manual_seed(0)
        options: dict[str, Any] = {"zero_init_last": False} if "resnet" in name else {}
        net = timm.create_model(name, **options)
        batches = [(torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))) for _ in range(images // batch)]
        plain = copy.deepcopy(net).train()
        lq.fold_batchnorm(net.eval())
        model = prepared(net, batches[:1])
        measure = partial(measure_sensitivity, model, metric="fisher", widths=range(1, 9))
        jobs: dict[str, Callable[[], Any]] = {"train": partial(_train, plain, batches)}
        for what, activations in (("weights", False), ("all", True)):
            jobs[f"{what}, once"] = partial(measure, batches=batches[:1], activations=activations)
            jobs[f"{what}, whole"] = partial(measure, batches=batches, activations=activations)
        seconds = _interleaved(jobs, rounds)
        base = seconds["train"] / images
        found: list[float] = []
        for what in ("weights", "all"):
            per_image = (seconds[f"{what}, whole"] - seconds[f"{what}, once"]) / (images - batch)
            found += [per_image / base, (seconds[f"{what}, once"] - batch * per_image) / base]
        with torch.no_grad():
            forward = _interleaved({"": partial(model, batches[0][0])}, rounds)[""] / batch
        items = sum(q.bits.numel() for q in quantizers(model))
        print(
            f"{name:24} {found[0]:5.2f}x  {found[2]:10.2f}x  {found[2] + found[3] / 512:20.2f}x  "
            f"{8 * items * forward / base:9.0f}x ({items} channels and activations)",
            flush=True,
        )


def _train(model: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()


# --- table -----------------------------------------------------------------------------------------------------------


def table(name: str, metrics: Sequence[str], widths: Sequence[int]) -> None:
    """Uniform, by layer and by channel at equal stored bytes, 8-bit activations, no fine-tuning."""
    net, batches, test = load(name)
    score = Score(net, test)
    print(f"{name}: float {score(net)[0]:.1f} %; top-1 %, KL to float, stored bytes")
    model = prepared(net, batches)
    start = copy.deepcopy(model.state_dict())
    tables = {metric: measure_sensitivity(model, batches, metric, activations=False) for metric in metrics}
    for width in widths:
        uniform = prepared(net, batches, width)
        size = lq.summary(uniform).bytes
        _row(f"W{width} uniform", score(uniform), size)
        for metric, granularity in ((m, g) for m in metrics for g in get_args(Granularity)):
            model.load_state_dict(start)
            found = lq.allocate(model, tables[metric], f"{size}B", granularity=granularity)
            lq.set_bits(model, found.weights)
            lq.calibrate(model, batches)
            _row(f"W{width} {metric}, {granularity}", score(model), lq.summary(model).bytes)


def cross(name: str, budgets: Sequence[float], images: int, test_images: int) -> None:
    """Additive losses and cross terms at equal mean bits of all weights, 8-bit activations, no fine-tuning."""
    net, batches, test = load(name, images)
    score = Score(net, test[: -(-test_images // len(test[0][0]))])
    print(f"{name}: float {score(net)[0]:.1f} %; top-1 %, KL to float, stored bytes")
    some = batches[: -(-256 // len(batches[0][0]))]
    model = prepared(net, some)
    start = copy.deepcopy(model.state_dict())
    measured = measure_sensitivity(model, batches, "model_fisher", activations=False, cross_terms=True)
    for bits, granularity, cross_terms in itertools.product(budgets, get_args(Granularity), (False, True)):
        model.load_state_dict(start)
        found = lq.allocate(model, measured, bits, granularity=granularity, cross_terms=cross_terms)
        lq.set_bits(model, found.weights)
        lq.calibrate(model, some)
        title = f"{bits:g} bits, {granularity}{', cross terms' if cross_terms else ''}"
        _row(title, score(model), lq.summary(model).bytes)


def _row(title: str, scores: tuple[float, float], size: int) -> None:
    print(f"  {title:36} {scores[0]:5.1f}  {scores[1]:8.4f}  {size}", flush=True)


# --- peers -----------------------------------------------------------------------------------------------------------


def modelopt(name: str, effective: float) -> None:
    """ModelOpt's gradient auto_quantize over 2, 4 and 8 bits, and lq on the same images, weights only, equal bits."""
    import modelopt.torch.quantization as mtq

    net, batches, test = load(
        name, 512, fold=False
    )  # ModelOpt's backward hooks do not bear sums in place on convolutions
    score = Score(net, test)
    images = sum(len(x) for x, _ in batches)

    def config(bits: int) -> dict[str, Any]:
        made: dict[str, Any] = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        made["quant_cfg"] = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
        ]
        return made

    theirs = copy.deepcopy(net)
    for module in theirs.modules():  # nor activations in place
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    start = time.perf_counter()
    theirs, _ = mtq.auto_quantize(
        theirs,
        constraints={"effective_bits": effective},
        quantization_formats=[config(2), config(4), config(8)],
        data_loader=batches,
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        num_calib_steps=1,
        num_score_steps=len(batches),
        verbose=False,
    )
    seconds = time.perf_counter() - start
    print(f"{name}, {images} images, {effective} bits per weight: top-1 %, KL to float, seconds")
    _seconds_row("ModelOpt, 2/4/8 bits by layer", score(theirs), seconds)
    variants: list[tuple[str, Granularity, Sequence[int] | None]] = [
        ("fisher", "layer", (2, 4, 8)),
        ("model_fisher", "layer", (2, 4, 8)),
        ("model_fisher", "layer", None),
        ("model_fisher", "channel", None),
    ]
    for metric, granularity, bits in variants:
        model = copy.deepcopy(net)
        start = time.perf_counter()
        lq.attach(model, 8, first_last=None)
        measured = measure_sensitivity(model, batches, metric)
        found = lq.allocate(model, measured, effective, granularity=granularity, bits=bits)
        lq.set_bits(model, found.weights)
        seconds = time.perf_counter() - start
        _seconds_row(f"lq {metric}, {granularity}, {bits or '1-8'}", score(model), seconds)


def _seconds_row(title: str, scores: tuple[float, float], seconds: float) -> None:
    print(f"  {title:44} {scores[0]:5.1f}  {scores[1]:8.4f}  {seconds:6.1f}", flush=True)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def finetune(budget: str, epochs: int, seeds: int) -> None:
    """ResNet-20 on exact CIFAR-10 pixels: allocated and uniform widths at equal bits, the same fine-tuning."""
    import logging
    import warnings

    import lightning as L

    from lq.callbacks import AllocateBits, FineTune, Quantize

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    reader = pack()
    _, card = reader.load_model("cifar10_resnet20")
    (x, y), (tx, ty) = (
        (reader.cifar_tensor(pixels, card), torch.from_numpy(labels))
        for pixels, labels in (reader.cifar10("train"), reader.cifar10("test"))
    )

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = reader.load_model("cifar10_resnet20")[0]

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5)

    bits = round(32 / float(budget.removesuffix("x")))
    variants: dict[str, Callable[[], list[Any]]] = {
        "uniform": lambda: [],
        "by layer": lambda: [AllocateBits(budget, "model_fisher", samples=1024)],
        "by channel": lambda: [AllocateBits(budget, "model_fisher", granularity="channel", samples=1024)],
    }
    print(f"ResNet-20, {budget}, 4-bit activations, {epochs} epochs on {len(x)} images: top-1 % of {len(ty)}, by seed")
    for name, allocate in variants.items():
        results = []
        for seed in range(seeds):
            L.seed_everything(seed, verbose=False)
            module = Module()
            # all layers count: uniform has no exception for the first and last
            callbacks = [Quantize(bits, 4, fold_bn=False, first_last=None), *allocate(), FineTune(schedule="cosine")]
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 64, shuffle=True)
            trainer.fit(module, loader)
            module.eval()
            with torch.no_grad():
                hits = [(module(a).argmax(1) == b).float() for a, b in TensorBatches(tx, ty, 100)]
            results.append(100 * float(torch.cat(hits).mean()))
        found = lq.summary(module)
        shown = ", ".join(f"{value:.1f}" for value in results)
        print(
            f"  {name:12} {np.mean(results):.2f}  ({shown})  {found.average_bits:.2f} bits, {found.bytes} bytes",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "fidelity", "table", "cross", "modelopt", "finetune"))
    parser.add_argument("--model", default=None, help="a timm model for cost, one of the data folder elsewhere")
    parser.add_argument("--metrics", nargs="+", default=["fisher", "model_fisher", "output_distortion"])
    parser.add_argument("--widths", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timings")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--allocations", type=int, default=100)
    parser.add_argument("--bits", type=float, default=4.0, help="mean width of the comparison with ModelOpt")
    parser.add_argument("--budget", default="10.66x")
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.0, 3.0], help="mean bits, for cross")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    name = options.model or "cifar10_resnet20"
    if options.part == "cost":
        cost([options.model] if options.model else ["resnet18", "efficientnet_lite0"], options.rounds)
    elif options.part == "fidelity":
        fidelity(name, options.images, options.allocations)
    elif options.part == "table":
        table(name, options.metrics, options.widths)
    elif options.part == "cross":
        cross(name, options.budgets, options.images, options.test_images)
    elif options.part == "modelopt":
        modelopt(name, options.bits)
    else:
        finetune(options.budget, options.epochs, options.seeds)


if __name__ == "__main__":
    main()
