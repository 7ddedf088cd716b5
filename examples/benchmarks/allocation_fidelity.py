"""Estimates of sensitivity beside what really happens: `allocation.py fidelity`."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from lq.sensitivity import BruteForce, Fisher, HawqV2, OutputDistortion, measure_sensitivity
from real_data import Batches, load, prepared


def fidelity(name: str, images: int, allocations: int) -> None:
    """Estimates beside what really happens."""
    net, batches, _ = load(name, images)
    model = prepared(net, batches[:8])
    metrics = {
        "Fisher": Fisher(),
        "model Fisher": Fisher("model"),
        "softened": Fisher("model", 2.0),
        "output distortion": OutputDistortion(),
    }
    tables = {key: measure_sensitivity(model, batches, metric) for key, metric in metrics.items()}
    if name.startswith("cifar10"):
        _ranks(model, batches, tables)
    _random_allocations(net, model, batches, tables, allocations)
    _additivity(net, batches, tables["output distortion"])
    _convergence(model, batches)


def _ranks(model: nn.Module, batches: Batches, tables: dict[str, lq.Sensitivity]) -> None:
    """Spearman's correlation over layers and widths 1 to 8, with brute force."""
    from scipy.stats import spearmanr

    print("rank correlation over weights and widths 1-8, brute force on the same images:")
    for measured in ("loss", "kl", "output_distortion"):
        exact = measure_sensitivity(model, batches, BruteForce(measured), activations=False)
        truth = np.stack([t.loss[1:] for t in exact.tensors])
        row = []
        for key, table in tables.items():
            found = np.stack([table[t.name].loss[1:] for t in exact.tensors])
            row.append(f"{key} {spearmanr(found.ravel(), truth.ravel())[0]:.3f}")
        print(f"  {measured}: " + ", ".join(row), flush=True)


def _random_allocations(
    net: nn.Module, model: nn.Module, batches: Batches, tables: dict[str, lq.Sensitivity], count: int
) -> None:
    """MPQCO's supplement, Figure 1: random allocations at 8x, true change of the loss beside the estimates."""
    some = batches[: max(1, 256 // len(batches[0][0]))]
    estimates = dict(tables)
    if batches[0][0].shape[-1] < 64:  # each vector takes a second derivative of everything
        estimates["HAWQ-V2"] = measure_sensitivity(model, some[:2], HawqV2(vectors=50), activations=False)
    layers = {t.name.removesuffix(".weight"): t.numel for t in tables["Fisher"].tensors if t.role == "weight"}
    changed = copy.deepcopy(net)
    lq.attach(changed, 8)
    reference = _losses(net, some)
    rng = np.random.default_rng(0)
    true: list[tuple[float, float]] = []
    found: dict[str, list[float]] = {key: [] for key in estimates}
    while len(true) < count:
        widths = dict(zip(layers, rng.integers(2, 9, len(layers)).tolist(), strict=True))
        mean = sum(widths[k] * n for k, n in layers.items()) / sum(layers.values())
        if not 3.9 < mean < 4.1:
            continue
        lq.set_bits(changed, widths)
        now = _losses(changed, some)
        true.append((float((now[0] - reference[0]).mean()), _divergence(reference[1], now[1])))
        for key, table in estimates.items():
            found[key].append(sum(table[f"{k}.weight"].loss[b] for k, b in widths.items()))
    print(f"{count} random allocations at 8x (2-8 bits), {sum(len(x) for x, _ in some)} images:")
    for key, values in found.items():
        for title, truth in zip(("loss", "KL"), np.array(true).T, strict=True):
            estimate = np.array(values)
            slope = float((estimate * truth).sum() / (estimate**2).sum())
            error = float(np.median(np.abs(truth - estimate) / np.abs(truth)))
            pearson = float(np.corrcoef(np.log(estimate), np.log(np.maximum(truth, 1e-9)))[0, 1])
            print(
                f"  {key:18} against {title:5} r {np.corrcoef(estimate, truth)[0, 1]:.3f} "
                f"(of logarithms {pearson:.3f}), slope {slope:.3g}, median relative error {error:.0%}",
                flush=True,
            )


@torch.no_grad()
def _losses(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    output = torch.cat([model.eval()(x) for x, _ in batches])
    return F.cross_entropy(output, torch.cat([y for _, y in batches]), reduction="none"), output.log_softmax(1)


def _divergence(reference: Tensor, now: Tensor) -> float:
    return float((reference.exp() * (reference - now)).sum(1).mean())


def _additivity(net: nn.Module, batches: Batches, table: lq.Sensitivity) -> None:
    """RDO-Q: the distortion of all together, over the sum of single ones, measured and estimated."""
    some = batches[: max(1, 256 // len(batches[0][0]))]
    print("distortion of all weights and activations together / sum of single ones (measured; one-pass estimate):")
    model = prepared(net, some)
    exact = measure_sensitivity(model, some[:1], BruteForce("output_distortion"), widths=range(3, 9))
    with torch.no_grad():
        reference = net(some[0][0])
        for width in range(8, 2, -1):
            lq.set_bits(model, {"*": width}, {"*": width})
            together = float((model.eval()(some[0][0]) - reference).square().mean())
            single = sum(float(t.loss[width - 3]) for t in exact.tensors)
            estimate = sum(float(t.loss[width]) for t in table.tensors)
            print(f"  {width} bits: {together / single:.2f}; {together / estimate:.2f}", flush=True)


def _convergence(model: nn.Module, batches: Batches) -> None:
    """How far the estimate is from that of all images, after a few."""
    size = len(batches[0][0])
    whole = measure_sensitivity(model, batches, "model_fisher", activations=False)
    print("median relative distance of layers x widths to the estimate of all images:")
    for count in (1, 2, 4, 8):
        if count < len(batches):
            part = measure_sensitivity(model, batches[:count], "model_fisher", activations=False)
            pairs = zip(part.tensors, whole.tensors, strict=True)
            distance = np.concatenate([np.abs(a.loss / b.loss - 1)[b.loss > 0] for a, b in pairs])
            print(f"  {count * size} images: {np.median(distance):.0%}", flush=True)
