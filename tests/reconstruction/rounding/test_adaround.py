"""AdaRound against its equations in float64, and against all roundings of a small layer."""

import itertools
import math

import pytest
import torch
from torch import nn

import lq
from lq.errors import SpecError
from lq.reconstruction.rounding import AdaRound
from tests.reconstruction.rounding.grids import CASES, grid_of, inside, pair, quantized


def rectified(v):
    return min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0.0), 1.0)


def beta(done, start, end, warmup, schedule):
    way = (done - warmup) / (1 - warmup)
    way = way if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * way)
    return start + way * (end - start)


@pytest.mark.parametrize("case", CASES)
def test_it_starts_at_the_float_weights(case):
    layer = quantized(case)
    weight, within = pair(layer)[1].detach(), inside(layer)
    grid = grid_of(layer)
    soft = grid.tensors(AdaRound().begin(grid).levels())[0].detach()
    assert within.any()
    torch.testing.assert_close(soft[within], weight[within], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(soft[~within], layer.weight[~within], rtol=0, atol=1e-6)  # clipped ones


@pytest.mark.parametrize("case", CASES)
def test_its_hard_start_is_nearest_rounding(case):
    layer = quantized(case)
    grid = grid_of(layer)
    with torch.no_grad():
        assert torch.equal(grid.tensors(AdaRound().begin(grid).hard_levels())[0], layer.weight)


def test_soft_levels_are_equation_23():
    layer = quantized("one width")
    grid = grid_of(layer)
    learned = AdaRound().begin(grid)
    with torch.no_grad():
        learned.v.copy_(torch.linspace(-6, 6, learned.v.numel()))
    expected = [
        min(max(math.floor(x) + rectified(v), grid.low), grid.high)
        for x, v in zip(grid.values.double().tolist(), learned.v.double().tolist(), strict=True)
    ]
    torch.testing.assert_close(learned.levels().detach().double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("done", [0.2, 0.3, 0.55, 0.99])
def test_the_penalty_is_equation_24(done, schedule):
    rule = AdaRound(penalty=0.03, beta=(16.0, 3.0), warmup=0.2, schedule=schedule)
    grid = grid_of(quantized("transposed"))
    learned = rule.begin(grid)
    with torch.no_grad():
        learned.v.copy_(torch.randn(learned.v.shape, generator=torch.Generator().manual_seed(0)) * 3)
    learned.advance(done)
    learned.levels()
    exponent = beta(done, 16.0, 3.0, 0.2, schedule)
    values = learned.v.detach().double().tolist()
    expected = 0.03 * sum(1 - abs(2 * rectified(v) - 1) ** exponent for v in values)
    assert learned.penalty().item() == pytest.approx(expected, rel=1e-4)
    assert rule.exponent(done) == pytest.approx(exponent)
    (gradient,) = torch.autograd.grad(learned.penalty(), learned.v)
    assert (gradient * learned.v.detach()).max() <= 0  # every weight is driven to its nearer end
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("done", "expected"), [(0.0, None), (0.199, None), (0.2, 20.0), (0.6, 11.0), (1.0, 2.0)])
def test_beta_falls_after_the_warmup(done, expected):
    found = AdaRound().exponent(done)
    assert found == (None if expected is None else pytest.approx(expected))
    learned = AdaRound().begin(grid_of(quantized("one width")))
    learned.advance(done)
    learned.levels()
    assert (learned.penalty() is None) == (expected is None)


def test_without_a_penalty_there_is_none():
    learned = AdaRound(penalty=0).begin(grid_of(quantized("one width")))
    learned.advance(0.9)
    learned.levels()
    assert learned.penalty() is None


def test_the_penalty_alone_decides_every_weight():
    grid = grid_of(quantized("a width for each channel"))
    learned = AdaRound(penalty=1.0, lr=0.05).begin(grid)
    optimizer = torch.optim.Adam(learned.parameters, lr=0.05)
    for step in range(300):
        learned.advance(step / 300)
        learned.levels()
        penalty = learned.penalty()
        if penalty is not None:
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
    soft, hard = learned.levels().detach(), learned.hard_levels()
    assert (soft - hard).abs().max() < 1e-3
    on_a_tie = ((grid.values - grid.offset) % 1 - 0.5).abs() < 0.01
    assert torch.equal(hard[~on_a_tie], grid.nearest()[~on_a_tie])


# --- against all roundings --------------------------------------------------------------------------------------


def problem(seed, bits, inputs=10):
    """A layer with one output and inputs that share a part, so that errors should cancel; and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 1, generator=generator) + 0.7 * torch.randn(256, inputs, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(1, inputs, generator=generator))
    spec = lq.QuantSpec(bits, signed=True, range="minmax")
    return lq.attach(model, spec, None, first_last=None).eval(), x


def least_loss(model, x):
    """The loss of the best of all ways to round up or down, in float64."""
    quantizer, weight = pair(model[0])
    weight, step, zero = weight.detach().double()[0], quantizer.step.double().item(), quantizer.zero_point.item()
    ends = [
        {min(max(level, -zero), 2 ** quantizer.bits.item() - 1 - zero) for level in (math.floor(v), math.floor(v) + 1)}
        for v in (weight / step).tolist()
    ]
    levels = torch.tensor(list(itertools.product(*ends)), dtype=torch.float64)
    return (x.double() @ (levels * step - weight).T).square().mean(0).min().item()


def reconstructed(seed, bits):
    model, x = problem(seed, bits)
    best = least_loss(model, x)
    found = lq.reconstruct(
        model, [x], units="layer", rounding=AdaRound(0.1, lr=0.03), drop=0, iterations=500, batch_size=256
    )
    return found.units[0].before / best, found.units[0].after / best


@pytest.mark.parametrize(("seed", "bits"), [(2, 3), (3, 3), (4, 2), (5, 2), (5, 3)])
def test_it_finds_the_best_of_all_roundings(seed, bits):
    before, after = reconstructed(seed, bits)
    assert before > 2
    assert 1 - 1e-4 <= after < 1.02


def test_it_is_near_the_best_wherever_one_looks():
    ratios = torch.tensor([reconstructed(seed, bits) for seed in range(10, 14) for bits in (2, 3)])
    assert (ratios >= 1 - 1e-4).all()
    assert (ratios[:, 1] <= ratios[:, 0]).all()
    assert ratios[:, 1].median() < 1.02 and ratios[:, 0].mean() > 1.3 * ratios[:, 1].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "step"}, r"schedule='step' is unknown; use one of \('linear', 'cosine'\)"),
        ({"penalty": -1}, "the penalty must not be negative"),
        ({"beta": (20.0, 0.0)}, "beta and lr must be positive"),
        ({"lr": 0}, "beta and lr must be positive"),
        ({"warmup": 1.0}, r"warmup a share in \[0, 1\)"),
        ({"warmup": -0.1}, r"warmup a share in \[0, 1\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(SpecError, match=message):
        AdaRound(**arguments)
