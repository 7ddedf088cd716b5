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

EfficientNet-Lite0, with the depthwise convolutions whose weights oscillate most, on images of 32 px; by labels alone:

    for part in "float --output outputs/lite0/float.pt --epochs 1" "table --output outputs/lite0 --bits 3 --steps 160
        --no-distill --methods lsq lsq_freeze lsq_dampen stableqat"; do
        python examples/benchmarks/finetuning.py $part --network lite0 --batch 64 --images 25000; done

Each finished run is a line of OUTPUT/results.jsonl; to run it again, remove the line.
"""

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

import torch

import lq
from benchmark_results import spread
from finetuning_runs import BATCH, NETWORKS, TITLES, Bench, callbacks, read, runs_of, work
from lq.sites import quantizers

METHODS = tuple(TITLES)[1:-2]
ABOUT_LIGHTNING = ".*(does not have many workers|LeafSpec).*"


def train_float(options: argparse.Namespace) -> None:
    """Train the network in float."""
    bench = Bench(options, options.output.parent, None)
    module = bench.module("float")
    before, start = bench.score(module)[0], time.perf_counter()
    bench.trainer(max_epochs=options.epochs).fit(module, bench.images)
    minutes = (time.perf_counter() - start) / 60
    torch.save(module.net.state_dict(), options.output)
    after = bench.score(module)[0]
    print(f"float: {before:.2f} %, trained {after:.2f} %, {minutes:.1f} min; saved {options.output}")


def show(options: argparse.Namespace) -> None:
    """The table, in markdown."""
    runs = runs_of(options.methods, options)
    there = {run: result for run, result in read(options.output).items() if run in runs}
    whole = there[runs[0]]["top1"] if runs[0] in there else float("nan")
    print(f"top-1 % on the test images (difference to float; KL to float), {options.steps} steps of {options.batch}\n")
    widths = " | ".join(f"W{bits}A{bits}" for bits in options.bits)
    print(f"| method | {widths} | minutes | weights that oscillate, frozen, % |")
    print("|---" * (len(options.bits) + 3) + "|")
    print("| float | " + f"{whole:.2f} | " * len(options.bits) + "- | |")
    for method in options.methods:
        mine = {run: result for run, result in there.items() if run.method == method}
        cells = []
        for bits in options.bits:
            top1, kl = ([result[key] for run, result in mine.items() if run.bits == bits] for key in ("top1", "kl"))
            change = f"({statistics.mean(top1) - whole:+.2f}; {statistics.mean(kl):.4f})" if top1 else ""
            cells.append(f"{spread(top1)} {change}".strip())
        minutes = f"{statistics.mean(result['minutes'] for result in mine.values()):.1f}" if mine else "-"
        shares = [
            "/".join(f"{100 * result[key]:.2f}" for key in ("oscillating", "frozen"))
            for result in mine.values()
            if "frozen" in result
        ]
        print(f"| {TITLES[method]} | " + " | ".join(cells) + f" | {minutes} | {', '.join(shares)} |")


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
        print(f"{TITLES[method]}, minus the same width everywhere: {spread(gain, sign='+')} points")


def diverge(options: argparse.Namespace) -> None:
    """What happens when learning rates are far too high."""
    bench = Bench(options, options.output, options.float or options.output / "float.pt")
    print(f"{options.steps} steps, learning rates x {options.faster:g}: loss, top-1 %, least and largest step")
    for bits, method in ((b, m) for b in options.bits for m in options.methods if m != "ptq"):
        module = bench.module(method, options.faster)
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
    common.add_argument("--network", choices=NETWORKS, default="resnet20")
    common.add_argument("--batch", type=int, default=BATCH, help="images of a step")
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
        part.add_argument("--steps", type=int, default=steps, help="optimizer steps")
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
