"""Weights with a zero point for each channel: how near the search comes to the best, and how they are asked for."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import weight_quantizer
from lq.callbacks import Quantize
from lq.quantizer.ranges import Lp, Samples
from lq.quantizer.ranges.rule import Levels
from tests.helpers import QUIET, fit, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def rows(kind, channels=24, count=72):
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(channels, count, generator=generator)
    if kind == "normal":
        return normal
    if kind == "skewed":
        return normal.exp() - 0.7
    if kind == "heavy tails":
        return normal / torch.rand(channels, count, generator=generator).clamp(min=0.05)
    if kind == "one side":
        return normal.abs() + 0.2
    return normal + torch.randn(channels, 1, generator=generator) * 2


KINDS = ["normal", "skewed", "heavy tails", "one side", "shifted"]


def error(values, step, zero, top, p):
    """The L_p error of rows on grids ``(q - zero) * step``; shape (C,), float64."""
    q = (values / step + zero).round().clamp(0, top)
    return (((q - zero) * step) - values).abs().pow(p).sum(-1)


def least_error(values, bits, p, shrinks=100):
    """The least error over all zero points and all shrinks of the widest step, in float64."""
    values, top = values.double(), 2**bits - 1
    span = values.amax(1).clamp(min=0) - values.amin(1).clamp(max=0)
    best = torch.full((len(values),), torch.inf, dtype=torch.float64)
    for zero in range(top + 1):
        for i in range(1, shrinks + 1):
            step = (span / top * i / shrinks)[:, None]
            best = torch.minimum(best, error(values, step, float(zero), top, p))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_comes_near_the_best_of_all_grids(kind, bits):
    values, p = rows(kind), 2.4
    levels = Levels(torch.full((len(values),), float(bits)), symmetric=False, signed=True)
    step, zero = levels.fit(*Lp(p)(Samples(values), levels))
    assert torch.equal(zero, zero.round()) and (zero >= 0).all() and (zero <= 2**bits - 1).all()
    found = error(values.double(), step.double()[:, None], zero.double()[:, None], 2**bits - 1, p)
    ratio = found / least_error(values, bits, p)
    assert ratio.mean() < 1.01
    assert ratio.max() < 1.10


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_no_worse_than_without_a_zero_point(kind, bits):
    values, p = rows(kind), 2.4
    widths = torch.full((len(values),), float(bits))
    errors = []
    for symmetric in (True, False):
        levels = Levels(widths, symmetric, signed=True)
        step, zero = levels.fit(*Lp(p)(Samples(values), levels))
        errors.append(error(values.double(), step.double()[:, None], zero.double()[:, None], 2**bits - 1, p))
    assert (errors[1] <= errors[0] * 1.1).all()
    assert errors[1].sum() < errors[0].sum()


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in (made[0], made[2], made[4]):
            layer.weight.add_(0.1)
    return made


def zero_points(made):
    return {name: q.zero_point.tolist() for name, m in made.named_modules() if (q := weight_quantizer(m)) is not None}


@pytest.mark.parametrize("structure", [False, True])
def test_attach(structure):
    found = {}
    for symmetric in (True, False):
        made = model()
        given = lq.inspect(made, torch.randn(2, 3, 5, 5)) if structure else None
        lq.attach(made, 3, None, structure=given, symmetric=symmetric, first_last=None)
        found[symmetric] = zero_points(made)
        for name, m in made.named_modules():
            quantizer = weight_quantizer(m)
            if quantizer is not None:
                assert quantizer.spec.symmetric == symmetric and quantizer.spec.bits == 3, name
                assert m.weight.unique().numel() > 2
                levels = (m.weight.detach().flatten(1) / quantizer.step[:, None]).round()
                assert (levels.amax(1) - levels.amin(1)).max() <= 7
    assert all(zero == 4 for points in found[True].values() for zero in points)
    assert all(len(set(points)) > 1 or points[0] != 4 for points in found[False].values())


def test_it_is_nearer_to_the_weights():
    errors = []
    for symmetric in (True, False):
        made, reference = model(), model()
        lq.attach(made, 2, None, symmetric=symmetric, first_last=None)
        errors.append(sum((made[i].weight - reference[i].weight).square().sum().item() for i in (0, 2, 4)))
    assert errors[1] < 0.8 * errors[0]


def test_first_and_last_layers_and_overrides():
    made = lq.attach(model(), 2, None, symmetric=False, overrides={"2": {"weights": 4}})
    specs = {name: q.spec for name, m in made.named_modules() if (q := weight_quantizer(m)) is not None}
    assert {name: spec.bits for name, spec in specs.items()} == {"0": 8, "2": 4, "4": 8}
    assert not any(spec.symmetric for spec in specs.values())
    own = lq.attach(model(), 2, None, symmetric=False, overrides={"2": {"weights": lq.QuantSpec(4, signed=True)}})
    assert weight_quantizer(own[2]).spec.symmetric  # a spec says itself what it is


def test_changed_widths_and_checkpoints_keep_zero_points():
    made = lq.attach(model(), 3, None, symmetric=False, first_last=None)
    lq.set_bits(made, {"0": [0, 1, 2, 3, 4, 5, 6, 8]})
    quantizer = weight_quantizer(made[0])
    for row, bits, zero in zip(made[0].weight, quantizer.bits.tolist(), quantizer.zero_point.tolist(), strict=True):
        assert row.unique().numel() <= 2**bits and 0 <= zero <= 2**bits - 1 and zero == round(zero)
    assert not made[0].weight[0].any()
    loaded = lq.load(made.state_dict(), model())
    assert zero_points(loaded) == zero_points(made)
    assert all(torch.equal(loaded[i].weight, made[i].weight) for i in (0, 2, 4))


def test_half_precision_has_the_same_grid():
    whole, half = (lq.attach(model(), 3, None, symmetric=False, first_last=None) for _ in range(2))
    half.bfloat16()
    assert zero_points(half) == zero_points(whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_callback(symmetric):
    module = tiny()
    fit(module, [Quantize(3, None, symmetric=symmetric, first_last=None)], max_epochs=0)
    points = zero_points(module)
    assert len(points) == 3
    assert all(zero == 4 for zeros in points.values() for zero in zeros) == symmetric
    assert Quantize(3, symmetric=symmetric).symmetric == symmetric


def test_the_last_sum_before_the_head_counts_as_its_input():
    """The last tensor on the skip path, pooled on its way to the last layer, has the last layer's width."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (
                nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2),
            )  # fmt: skip

        def forward(self, x):
            x = self.a(x).relu()
            x = (x + self.b(x)).relu()
            x = (x + self.c(x)).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    made, x = Pooled(), torch.randn(2, 3, 6, 6)
    structure = lq.inspect(made, x)
    skips = [site for site in structure.sites if site.role == "skip"]
    assert skips[-1].layer in structure.last and skips[0].layer not in structure.last
    lq.attach(made, 2, 3, structure=structure, skip=True)
    bits = {q.name: int(q.bits) for q in lq.attachment.sites.activation_quantizers(made).values()}
    assert bits[skips[-1].name] == 8 and bits[skips[0].name] == 3
    assert bits["head.input"] == 8
