"""Sensitivity and allocation of a network, looked at: from one pass over its training images to widths and plots.

Trains the small timm ResNet of examples/quickstart.py on scikit-learn's digits (or, with LQ_DATA and --real, takes the
pretrained ResNet-20 and CIFAR-10 images of that folder), measures what every width of every channel costs, solves the
knapsack for a range of budgets, and draws

- ``bits_per_layer.png``: the widths chosen at one budget, by layer and, as a mean, by channel;
- ``sensitivity.png``: rate-distortion curves, the expected loss of each layer at each width;
- ``pareto_front.png``: the least expected loss at each mean width, by layer and by channel, and uniform widths beside.

    python examples/allocate_bits.py
"""

import argparse
import copy
import logging
import runpy
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

import lq
from lq.allocation.allocate import Granularity

Batches = list[tuple[Tensor, Tensor]]
BUDGETS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0)


def digits(epochs: int) -> tuple[nn.Module, Batches, Batches]:
    """The network of the quickstart, trained, and its images."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.manual_seed(0)
    quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
    module, data = quickstart["Classifier"](), quickstart["Digits"]()
    quickstart["fit"](module, data, epochs, [], False)
    return module.eval(), list(data.train_dataloader())[:8], list(data.val_dataloader())


def real() -> tuple[nn.Module, Batches, Batches]:
    """ResNet-20 and CIFAR-10 from the data folder."""
    benchmark = runpy.run_path(str(Path(__file__).with_name("benchmarks") / "real_data.py"))
    found: tuple[nn.Module, Batches, Batches] = benchmark["load"]("cifar10_resnet20")
    return found


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Top-1 in percent."""
    hits = [(model.eval()(x).argmax(1) == y).float() for x, y in batches]
    return 100 * float(torch.cat(hits).mean())


def widths(found: lq.Allocation) -> dict[str, float]:
    """Mean width of each layer."""
    return {layer: float(np.mean(bits)) for layer, bits in found.weights.items()}


def plot(
    table: lq.Sensitivity, by_budget: dict[str, list[lq.Allocation]], uniform: list[float], budget: float, folder: Path
) -> None:
    """Draw the three figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weights = [tensor for tensor in table.tensors if tensor.role == "weight"]
    names = [tensor.name.removesuffix(".weight") for tensor in weights]

    figure, axes = plt.subplots(figsize=(max(6, 0.3 * len(names)), 4))
    for offset, (title, found) in zip((-0.2, 0.2), by_budget.items(), strict=True):
        chosen = widths(found[BUDGETS.index(budget)])
        axes.bar(np.arange(len(names)) + offset, [chosen[name] for name in names], 0.4, label=f"by {title}")
    axes.set(ylabel="bits", title=f"Widths at {budget} bits on average")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.legend()
    _save(figure, folder / "bits_per_layer.png")

    figure, axes = plt.subplots(figsize=(6, 4))
    for tensor, colour in zip(weights, plt.get_cmap("viridis")(np.linspace(0, 1, len(weights))), strict=True):
        axes.plot(table.widths[1:], tensor.loss[1:], color=colour, lw=1)
    axes.set(yscale="log", xlabel="bits", ylabel=f"expected loss ({table.metric})", title="Layers, first to last")
    _save(figure, folder / "sensitivity.png")

    figure, axes = plt.subplots(figsize=(6, 4))
    for title, found in by_budget.items():
        axes.plot(BUDGETS, [one.loss for one in found], "o-", label=f"by {title}")
    axes.plot(range(2, 7), uniform, "s", label="uniform")
    axes.set(yscale="log", xlabel="bits per weight", ylabel=f"expected loss ({table.metric})", title="Pareto front")
    axes.legend()
    _save(figure, folder / "pareto_front.png")
    plt.close("all")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"Saved {path}.")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/allocation"), help="folder for JSON and plots")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of the float training")
    parser.add_argument("--real", action="store_true", help="ResNet-20 and CIFAR-10 from LQ_DATA instead of digits")
    parser.add_argument("--metric", default="model_fisher")
    parser.add_argument("--budget", type=float, default=3.0, choices=BUDGETS, help="mean width of the comparison")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    net, train, test = real() if options.real else digits(options.epochs)
    lq.fold_batchnorm(net)
    model = lq.calibrate(lq.attach(copy.deepcopy(net), weights=8, activations=8, first_last=None), train)
    table = lq.measure_sensitivity(model, train, options.metric, activations=False)
    print(table)
    by_budget = {
        granularity: [lq.allocate(model, table, budget, granularity=granularity) for budget in BUDGETS]
        for granularity in get_args(Granularity)
    }
    uniform = [sum(float(tensor.loss[width]) for tensor in table.tensors) for width in range(2, 7)]
    plot(table, by_budget, uniform, options.budget, options.output)

    found = {"float": accuracy(net, test)}
    lq.set_bits(model, {"*": int(options.budget)})
    found["uniform"] = accuracy(lq.calibrate(model, train), test)
    for granularity, allocations in by_budget.items():
        chosen = allocations[BUDGETS.index(options.budget)]
        (options.output / f"{granularity}.json").write_text(chosen.to_json(), encoding="utf-8")
        lq.set_bits(model, chosen.weights)
        found[f"by {granularity}"] = accuracy(lq.calibrate(model, train), test)
    for title, value in found.items():
        print(f"{title:12} {value:.1f} % top-1" + ("" if title == "float" else f" at {options.budget} bits per weight"))
    return found


if __name__ == "__main__":
    main()
