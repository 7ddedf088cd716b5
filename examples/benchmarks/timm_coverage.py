r"""Every architecture family of timm through lq, at random weights: what works, and the cause of what does not.

One small variant of each family (a module of ``timm.models``) goes through inspect, fold, attach (8-bit weights and
activations, attention included), calibrate, forward (SQNR to the float model), backward, a state-dict round trip into a
fresh model (bit-identical), torch.export (same output) and detach (bit-identical weights and output).

    python examples/benchmarks/timm_coverage.py                   # all families; finished ones are not run again
    python examples/benchmarks/timm_coverage.py --part 0 --of 5 --out part.json \
        --compare examples/benchmarks/timm_coverage.json          # a fifth, as CI runs it

Results go to ``examples/benchmarks/timm_coverage.json``, the table to ``timm_coverage.md`` beside it.
"""

import argparse
import copy
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import list_models
from torch import Tensor, nn

import lq

HERE = Path(__file__).parent
GOAL = 20  # dB
STEPS = ("inspect", "attach", "calibrate", "forward", "backward", "state dict", "export", "detach")
#: Words that name small variants, smallest first.
SMALL = (
    "test", "zepto", "atto", "femto", "xxtiny", "xxs", "xxsmall", "pico", "nano", "micro", "xtiny", "xs", "m0",
    "t0", "_t1", "s0", "_b0", "b0", "lcnet_035", "mini", "tiny", "ultra", "_050", "_035", "small", "_s", "t2", "_n",
    "18", "14", "20t", "26", "p2", "11", "13", "34", "38", "42", "39", "base", "b1", "50", "_m",
)  # fmt: skip


def families() -> list[str]:
    """Names of the modules of timm.models that have models."""
    modules = {timm.models.model_entrypoint(name).__module__ for name in list_models()}
    return sorted(name.rpartition(".")[2] for name in modules)


def variant(family: str) -> str:
    """A small model of a family, told by its name."""

    def size(name: str) -> tuple[int, int, str]:
        rank = next((i for i, word in enumerate(SMALL) if word in name), len(SMALL))
        return rank, len(name), name

    return min(list_models(module=family), key=size)


def build(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """The model with random weights, as small an image as it takes, and a batch of two."""
    config = timm.get_pretrained_cfg(name)
    full = config.input_size[-1] if config else 224
    fixed = config is not None and config.fixed_input_size
    attempts: list[tuple[int, dict[str, Any]]] = [(128, {"img_size": 128}), (full, {})]
    if not fixed:
        attempts.insert(1, (128, {}))
    if "resnet" in name:  # timm zeroes the last norm of each block, which leaves nothing to measure
        attempts = [(size, {**options, "zero_init_last": False}) for size, options in attempts] + attempts
    for size, options in attempts:
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, **options).eval()
            if sum(p.numel() for p in model.parameters()) > 2e8 and "depth" not in options:
                model = timm.create_model(name, **options, depth=4).eval()
            randomize(model)
            images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                model(images)
        except Exception:  # noqa: BLE001 - whatever a model raises on a size or option it does not take
            continue
        return model, images
    raise RuntimeError(f"{name} could not be built")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give heads that start at zero and norms that start as the identity values that leave something to measure."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.trunc_normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            for tensor, middle in ((module.running_mean, 0.0), (module.running_var, 1.0), (module.weight, 1.0)):
                if tensor is not None:
                    tensor.copy_(middle + 0.2 * torch.rand_like(tensor) - 0.1)


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first_tensor(next(iter(output)))


def check(name: str, export: bool = True) -> dict[str, Any]:
    """Take one model through all steps; what was reached, measured and raised."""
    found: dict[str, Any] = {"model": name, "passed": [], "error": None}
    model, images = build(name, 0)
    found["image"] = images.shape[-1]
    found["parameters"] = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        unfolded = first_tensor(model(images))

    def step(title: str, action: Callable[[], Any]) -> Any:
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - the table lists whatever goes wrong
            found["error"] = found["error"] or f"{title}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found.setdefault("failed", []).append(title)
            return None
        found["passed"].append(title)
        return result

    found["folded"] = len(lq.fold_batchnorm(model))
    with torch.no_grad():
        expected = first_tensor(model(images))
    found["fold error"] = float((expected - unfolded).abs().max() / unfolded.abs().max().clamp(min=1e-12))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure = step("inspect", lambda: lq.inspect(model, images))
    if structure is None:
        return found
    found["share"] = structure.share
    found["float operations"] = [f"{o.name}: {o.reason}" for o in structure.operations if o.reason][:5]
    if step("attach", lambda: lq.attach(model, 8, 8, structure=structure)) is None:
        return found
    if step("calibrate", lambda: lq.calibrate(model, [images])) is None:
        return found

    def forward() -> Tensor:
        with torch.no_grad():
            output = first_tensor(model(images))
        if not torch.isfinite(output).all():
            raise ValueError("the output is not finite")
        noise = float((output - expected).double().square().sum())
        signal_power = float(expected.double().square().sum())
        found["sqnr"] = None if noise == 0 or signal_power == 0 else 10 * math.log10(signal_power / noise)
        return output

    output = step("forward", forward)

    def backward() -> None:
        model.train()
        lq.set_estimator(model, "lsq")
        output = first_tensor(model(images))
        (output * torch.randn_like(output)).mean().backward()
        if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()):
            raise ValueError("no parameter has a gradient")
        model.zero_grad()
        lq.set_estimator(model, "ste")
        model.eval()

    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    step("backward", backward)
    model.eval()
    model.load_state_dict(statistics)  # the running statistics that training mode moved

    def round_trip() -> None:
        loaded = lq.load(copy.deepcopy(model.state_dict()), build(name, 1)[0])
        loaded.train().eval()  # some models keep what they compute from their weights while they stay in eval mode
        with torch.no_grad():
            if not torch.equal(first_tensor(loaded(images)), output):
                raise ValueError("the loaded model gives another output")

    if output is not None:
        step("state dict", round_trip)

    def exported() -> None:
        program = torch.export.export(model, (images,))
        with torch.no_grad():
            got = first_tensor(program.module()(images))
        if not torch.allclose(got, output, rtol=1e-3, atol=1e-3 * float(output.abs().max())):
            raise ValueError(f"exported output differs by {float((got - output).abs().max()):.3g}")

    if output is not None and export:
        step("export", exported)
        if "export" in found.get("failed", []):
            try:
                torch.export.export(build(name, 0)[0], (images,))
            except Exception as error:  # noqa: BLE001
                found["float export"] = f"{type(error).__name__}"

    def detached() -> None:
        lq.detach(model)
        with torch.no_grad():
            same = torch.equal(first_tensor(model(images)), expected)
        now = model.state_dict()
        if not same or now.keys() != before.keys() or any(not torch.equal(now[key], before[key]) for key in now):
            raise ValueError("the detached model is not the one before attach")

    step("detach", detached)
    if (found.get("sqnr") or GOAL) < GOAL:  # is it one wrong site, or rounding noise that the random weights amplify?
        lq.calibrate(lq.attach(model, 16, 16, structure=structure), [images])
        with torch.no_grad():
            noise = float((first_tensor(model(images)) - expected).double().square().sum())
        found["sqnr at 16 bits"] = 10 * math.log10(float(expected.double().square().sum()) / noise)
    return found


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after a while."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        f"| family | model | image | {' | '.join(STEPS)} | MACs quantizable | SQNR, dB | cause |",
        "|" + "---|" * (len(STEPS) + 6),
    ]
    for family, found in sorted(results.items()):
        marks = ["yes" if step in found["passed"] else "no" for step in STEPS]
        sqnr = found.get("sqnr")
        share = found.get("share")
        cause = (found.get("error") or "").replace("|", "/")[:160]
        if "sqnr at 16 bits" in found:
            cause += (
                f"{found['sqnr at 16 bits']:.1f} dB at 16 bits: random weights amplify rounding noise, no site is off"
            )
        if found.get("float export"):
            cause += f" (the float model fails too: {found['float export']})"
        lines.append(
            f"| {family} | {found['model']} | {found.get('image', '')} | {' | '.join(marks)} | "
            f"{'' if share is None else f'{100 * share:.2f} %'} | {'' if sqnr is None else f'{sqnr:.1f}'} | {cause} |"
        )
    count = max(len(results), 1)
    totals = [f"{step} {sum(step in r['passed'] for r in results.values())}/{count}" for step in STEPS]
    return "\n".join([f"{len(results)} families: {', '.join(totals)}.", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=0, help="which part to run")
    parser.add_argument("--of", type=int, default=1, help="number of parts")
    parser.add_argument("--only", nargs="*", help="families to run (again)")
    parser.add_argument("--out", type=Path, default=HERE / "timm_coverage.json")
    parser.add_argument("--compare", type=Path, help="results that must be reached again; exit with 1 if they are not")
    parser.add_argument("--seconds", type=int, default=180, help="limit per family")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for family in options.only or families()[options.part :: options.of]:
        if family in results and not options.only:
            continue
        start, name = time.perf_counter(), variant(family)
        try:
            with limit(options.seconds):
                results[family] = check(name)
        except Exception as error:  # noqa: BLE001 - the table lists whatever goes wrong
            results[family] = {"model": name, "passed": [], "error": f"{type(error).__name__}: {str(error)[:200]}"}
        found = results[family]
        seconds = time.perf_counter() - start
        sqnr = found.get("sqnr")
        print(
            f"{family:32s} {name:40s} {seconds:5.0f} s  {len(found['passed'])}/{len(STEPS)}  "
            f"{'' if sqnr is None else f'{sqnr:.1f} dB'}  {found.get('share', 0):.4f}  {found['error'] or ''}",
            flush=True,
        )
        options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    options.out.with_suffix(".md").write_text(table(results))
    if options.compare:
        earlier = json.loads(options.compare.read_text())
        worse = {
            family: sorted(set(earlier[family]["passed"]) - set(found["passed"]))
            for family, found in results.items()
            if family in earlier and set(earlier[family]["passed"]) - set(found["passed"])
        }
        if worse:
            raise SystemExit(f"steps that passed before and do not now: {worse}")
        print(f"{len(results)} families pass every step they passed before.")


if __name__ == "__main__":
    main()
