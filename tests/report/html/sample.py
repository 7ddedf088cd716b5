"""A report with everything in it, of a network with as many layers as asked for."""

import math

from lq.report.comparison import Closeness, Comparison, LayerComparison, Part
from lq.report.html import History, Report


def sample(layers: int = 150, steps: int = 200) -> Report:
    """The report; numbers follow simple rules."""
    names = [f"blocks.{i // 4}.{('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')[i % 4]}" for i in range(layers)]
    summary = {
        "layers": [
            {
                "name": name,
                "kind": "Linear",
                "shape": [192, 768],
                "weight_bits": [2, 3, 4] if i % 7 == 3 else [2 + i % 7],
                "average_bits": 2.0 + i % 7,
                "input_bits": 8 if i % 5 == 0 else 4,
                "bytes": 10_000 + 7_000 * (i % 9),
                "macs": 1e8,
                "bitops": 1e9 * (1 + i % 6),
            }
            for i, name in enumerate(names)
        ],
        "bytes": 2_900_000,
        "float_bytes": 22_900_000,
        "average_bits": 3.87,
        "bitops": 1.2e11,
        "notes": [],
        "compression": 22.9 / 2.9,
    }
    rows = tuple(
        LayerComparison(
            name,
            "Linear",
            i,
            1,
            (Part(f"{name}.weight", True, 4.0, 18.0 + i % 9, 0.1, "lp", True),),
            Closeness(8.0 + 24 * abs(math.sin(i)), 0.98, 0.01),
            Closeness(6.0 + 14 * abs(math.sin(i)), 0.95, 0.03),
            f"{name}.weight: 5 bits" if abs(math.sin(i)) < 0.5 else "",
        )
        for i, name in enumerate(names)
    )
    rows = tuple(sorted(rows, key=lambda row: row.alone.sqnr if row.alone else 0.0))
    comparison = Comparison(rows, Closeness(11.9, 0.968, 0.025), 64, ("not reached by these batches: head_dist",))
    times = list(range(0, 50 * steps, 50))
    history = History(
        steps=times,
        rates={"optimizer": [0.05 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]},
        bits={
            "weights": [8 - 4 * i / steps for i in range(steps)],
            "activations": [8 - 3 * i / steps for i in range(steps)],
        },
        names=[f"{name}.weight" for name in names],
        alpha=[[-6 + 0.01 * math.sin(i / 9 + j) * j for j in range(layers)] for i in range(steps)],
        widths=[[round(8 - (4 + j % 3) * i / steps, 3) for j in range(layers)] for i in range(steps)],
        changed={name: [0.0] + [0.1 / (1 + i / 20) for i in range(1, steps)] for name in names},
        metrics=[
            {"step": 500.0 * i, "epoch": float(i), "val_acc": 0.7 + 0.1 * i / (1 + i), "val_loss": 1 / (1 + i)}
            for i in range(20)
        ],
    )
    return Report(
        title="VisionTransformer",
        created="2026-01-02 03:04 UTC",
        summary=summary,
        channels={names[3]: {"2": 20, "3": 100, "4": 72}},
        accuracy={"float": 0.7547, "calibrated": 0.713, "final": 0.7484},
        accuracy_samples=1024,
        sensitivity={
            "metric": "Fisher",
            "widths": [1, 2, 3, 4, 5, 6, 7, 8],
            "samples": 512,
            "losses": {f"{name}.weight": [(1 + i % 11) * 4.0**-w for w in range(8)] for i, name in enumerate(names)},
        },
        allocation={"metric": "Fisher", "solver": "lagrangian", "expected loss": "0.012", "cost, 8x": "7.99x"},
        pareto=[[1 + i * 0.7, 2.0 * 4.0**-i] for i in range(10)],
        chosen=[3.87, 0.012],
        reconstruction=[
            {
                "units": [_unit(f"blocks.{i}", 0.1 * (1 + i % 3)) for i in range(layers // 4)],
                "merges": None,
            }
        ],
        ranges={"before": 0.31, "after": 0.22, "evaluations": 300},
        history=history,
        comparison={**_plain(comparison)},
        files=[{"path": "model.onnx", "bytes": 2_950_000}],
        settings={"Quantize": {"weights": "4", "activations": "4"}},
        environment={"lq": "0.1.0", "torch": "2.10.0", "device": "cpu"},
    )


def _unit(name: str, loss: float) -> dict[str, object]:
    return {"name": name, "before": loss, "after": loss / 5, "curve": [], "iterations": 2000, "seconds": 12.0}


def _plain(comparison: Comparison) -> dict[str, object]:
    import json

    return dict(json.loads(comparison.to_json()))
