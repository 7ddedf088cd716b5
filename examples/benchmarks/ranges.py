"""What the L_p range search costs, and how near it comes to rounding every value for every candidate.

    python examples/benchmarks/ranges.py search [--model vit_tiny_patch16_224]  # real weights need LQ_DATA; else random
    python examples/benchmarks/ranges.py sensitivity --model vit_small_patch16_224   # of a timm model, random weights

`search` takes the rows of random tensors, or of the weights of a real model, at each width: the CPU time of `Lp`, that
of `DirectSearch` (which rounds all values for about 27 candidates, several hundred with a free zero point), and the sum
of the errors against the least that brute force over all candidates finds (with a free zero point: against
`DirectSearch`). `sensitivity` gives the CPU time of attaching, and of a one-pass sensitivity of one and two batches of
8 images: what does not grow with batches is the fixed part. All on one thread; ratios count, absolute times do not.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from lq.quantizer.ranges import Levels, Lp, Samples
from lq.quantizer.ranges.direct import DirectSearch, errors
from real_data import pack

KINDS = {"symmetric": (True, True), "unsigned": (True, False), "zero point": (False, True)}
P, CANDIDATES = 2.4, 100
SHAPES = ((1024, 256), (400, 768), (100, 3072), (1, 300_000))


def timed(call: Callable[[], tuple[Tensor, Tensor]], times: int = 3) -> tuple[float, tuple[Tensor, Tensor]]:
    """The least CPU seconds of a few calls, and the result."""
    found = []
    for _ in range(times):
        begin = time.thread_time()
        result = call()
        found.append(time.thread_time() - begin)
    return min(found), result


def ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, with 0 between them."""
    return values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)


def direct(values: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Ranges by `DirectSearch`, in blocks of rows that stay in a cache."""
    search, size = DirectSearch(P, CANDIDATES), max(1, (1 << 17) // values.shape[1])
    parts = [
        search(part, *ends(part), replace(levels, bits=bits), None)
        for part, bits in zip(values.split(size), levels.bits.split(size), strict=True)
    ]
    low, high = (torch.cat(part) for part in zip(*parts, strict=True))
    return low, high


def error(values: Tensor, levels: Levels, found: tuple[Tensor, Tensor]) -> Tensor:
    """The errors of ranges, in float64."""
    wide = replace(levels, bits=levels.bits.double())
    low, high = (end.double() for end in found)
    return errors(values.double(), wide, low, high, P, None)


def brute_force(values: Tensor, levels: Levels) -> Tensor:
    """The least error of each row over all shrinks of its range."""
    low, high = ends(values)
    scale = [i / CANDIDATES for i in range(1, CANDIDATES + 1)]
    return torch.stack([error(values, levels, (s * low, s * high)) for s in scale]).amin(0)


def random_rows(kind: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Names and rows of normal values, and of values with heavy tails."""
    for channels, length in SHAPES:
        for name in ("normal", "heavy tails"):
            values = torch.randn(channels, length)
            values *= torch.empty(channels, length).exponential_() if name == "heavy tails" else 1.0
            yield f"{channels} x {length} {name}", [values.abs() if kind == "unsigned" else values]


def real_rows(name: str) -> list[Tensor]:
    """The weights of a real model, by output channel."""
    model, _ = pack().load_model(name)
    kinds = (nn.Linear, nn.Conv2d)
    return [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, kinds)]


def search(model: str | None, kinds: list[str], widths: list[int]) -> None:
    """Print time and error of each width."""
    print("rows, kind, bits: direct / table time, ns a value, error over the least (%), over the direct search (%)")
    for kind in kinds:
        sets = random_rows(kind) if model is None else iter([(model, real_rows(model))])
        for name, tensors in sets:
            for bits in widths:
                seconds, sums, size = [0.0, 0.0], [0.0, 0.0, 0.0], sum(t.numel() for t in tensors)
                for values in tensors:
                    levels = Levels(torch.full((len(values),), float(bits)), *KINDS[kind])
                    new, by_table = timed(lambda: Lp(P, CANDIDATES)(Samples(values), levels))  # noqa: B023
                    old, by_direct = timed(lambda: direct(values, levels), 1)  # noqa: B023
                    found, other = (error(values, levels, ranges) for ranges in (by_table, by_direct))
                    best = other if levels.zero_is_free else brute_force(values, levels)
                    parts = (found, best, other)
                    seconds = [seconds[0] + new, seconds[1] + old]
                    sums = [total + float(part.sum()) for total, part in zip(sums, parts, strict=True)]
                over = [100 * (sums[0] / total - 1) for total in sums[1:]]
                times = f"{seconds[1] / seconds[0]:5.1f} {seconds[0] / size * 1e9:6.1f}"
                print(f"{name}, {kind}, {bits}: {times} {over[0]:+.3f} {over[1]:+.3f}", flush=True)


def sensitivity(name: str) -> None:
    """Print the CPU time of attaching and of a sensitivity."""
    model = timm.create_model(name, pretrained=False).eval()
    batch = (torch.randn(8, 3, 224, 224), torch.randint(1000, (8,)))

    def seconds(call: Callable[[], object]) -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    def step() -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        model.zero_grad()

    step()
    unit = min(seconds(step) for _ in range(3))
    print(f"{name}: forward and backward of 8 images {unit:.2f} CPU seconds")
    print(f"attach {seconds(lambda: lq.attach(model, weights=4, activations=8)) / unit:.2f} of these", flush=True)
    print(f"calibrate on 8 images {seconds(lambda: lq.calibrate(model, [batch])) / unit:.2f}", flush=True)
    once, twice = (min(seconds(lambda: lq.measure_sensitivity(model, [batch] * n)) for _ in range(2)) for n in (1, 2))  # noqa: B023
    print(f"sensitivity of 8 images {once / unit:.2f}, of another 8 {(twice - once) / unit:.2f}", flush=True)
    print(f"fixed part {(2 * once - twice) / unit:.2f}")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("search", "sensitivity"))
    parser.add_argument("--model")
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--bits", type=int, action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad() if given.part == "search" else torch.enable_grad():
        if given.part == "search":
            search(given.model, given.kind or list(KINDS), given.bits or list(range(1, 9)))
        else:
            sensitivity(given.model or "vit_small_patch16_224")


if __name__ == "__main__":
    main()
