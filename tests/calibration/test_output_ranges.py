"""Ranges by the output: against a search by hand, on all kinds of layers, batches and ranks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lq
from lq.attachment.sites import activation_quantizers, input_quantizer, quantizers, weight_quantizer
from lq.calibration.output_ranges import FEW, SAMPLES
from tests.quantizer.test_histogram import Ranks

INPUT = lq.QuantSpec(4, per_channel=False, symmetric=False, range="output")


def images(count, *shape, seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) ** 3


def steps(model):
    return {q.name: q.log2_step.detach().clone() for q in quantizers(model)}


def attached(model, x, *widths, **options):
    return lq.attach(model, *widths, structure=lq.inspect(model, x[:2]), **options)


def test_input_of_a_linear_layer():
    """The error of the output is that of the best of 2 000 steps, but for 1 %."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 16)
    x = images(SAMPLES, 8)
    model = nn.Sequential(nn.Identity(), layer)
    lq.calibrate(attached(model, x, None, 4, overrides={"1": {"activations": INPUT}}), [x])
    site = input_quantizer(layer)
    zero, exact = float(site.zero_point), layer(x).detach()

    @torch.no_grad()
    def error(step):
        rounded = ((x / step).round() + zero).clamp(0, 15).sub(zero) * step
        return float((F.linear(rounded, layer.weight, layer.bias) - exact).square().sum())

    best = min(error(step) for step in float(site.step) * torch.logspace(-2, 2, 2000, base=2))
    assert error(float(site.step)) == pytest.approx(float((model(x) - exact).detach().square().sum()), rel=1e-3)
    assert error(float(site.step)) <= 1.01 * best


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (6,)),
        (nn.Linear(6, 5), (7, 6)),
        (nn.Conv1d(4, 6, 3), (4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 9, 9)),
        (nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 9, 9)),
        (nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value)),
)
def test_channels_of_weights(layer, shape):
    """Relative to its token, no channel of the output is farther from the float one, and some are nearer."""
    torch.manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) ** 3)
    x = images(FEW, *shape)
    dim = 1 if len(shape) > 2 or isinstance(layer, nn.Conv1d) else -1
    errors = []
    x = x * torch.logspace(0, 2, x.shape[1]).view(-1, *[1] * (x.ndim - 2))  # weights of the last count most
    exact, token = layer(x), list(range(1, x.ndim)) if dim == 1 else [-1]
    for rule in ("auto", "output"):
        model = nn.Sequential(copy.deepcopy(layer))
        lq.calibrate(lq.attach(model, 3, None, first_last=None, range=rule, include="0"), [x])
        squares = (model(x) - exact).square() / exact.square().sum(token, keepdim=True)
        errors.append(squares.detach().movedim(dim, 0).flatten(1).sum(1))
    before, after = errors
    assert bool((after <= before * 1.01).all())
    assert float((after / before).mean()) < 0.999
    assert weight_quantizer(model[0]).log2_step.unique().numel() > 1


class Weighing(nn.Module):
    """Attention with given scores: few large probabilities, and many small ones that matter together."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        if self.fused:
            return F.scaled_dot_product_attention(3 * x, x, x)
        return (3 * x @ x.transpose(-2, -1) / x.shape[-1] ** 0.5).softmax(-1) @ x


@pytest.mark.parametrize("fused", [True, False])
def test_probabilities(fused):
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 2, 64, 8)
    net = Weighing(fused)
    exact, errors = net(x), {}
    for rule in ("auto", "output"):
        model = copy.deepcopy(net)
        lq.calibrate(attached(model, x, None, 3, range=rule, first_last=None), [x])
        errors[rule] = float(((model(x) - exact).square().sum(-1) / exact.square().sum(-1)).mean())
    assert errors["output"] < 0.95 * errors["auto"]


def test_only_what_asks_for_it_moves():
    torch.manual_seed(0)
    x = images(SAMPLES, 6)
    found = []
    for spec in (lq.QuantSpec(4, per_channel=False, symmetric=False), INPUT):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        lq.attach(model, 4, 4, first_last=None, overrides={"2": {"activations": spec}})
        found.append(steps(lq.calibrate(model, [x])))
    plain, output = found
    assert not torch.equal(plain.pop("2.input"), output.pop("2.input"))
    assert all(torch.equal(plain[name], output[name]) for name in plain)


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 4))
    x = images(SAMPLES, 3, 6, 6)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = lq.calibrate(attached(net, x, 4, 4, range="output"), [x])
    assert model.training
    assert all(q.tap is None for q in quantizers(model))
    assert all(p.requires_grad for p in model.parameters())
    lq.detach(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_that_hold_more_than_enough():
    """Only the first batches, until there are enough samples, are run again."""
    runs = []

    class Counting(nn.Linear):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    net = nn.Sequential(nn.Linear(6, 6), Counting(6, 2))
    x = images(6 * SAMPLES, 6)
    lq.calibrate(lq.attach(net, None, 4, range="output", first_last=None), x.split(SAMPLES // 2))
    assert runs[:12] == [SAMPLES // 2] * 12
    assert len(runs) > 12
    assert len(runs) < 12 + 2 * 3 * (1 + 1 + 15)


def test_two_ranks_find_what_one_does():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = images(2 * SAMPLES, 6)

    def model():
        return lq.attach(copy.deepcopy(net), 4, 4, range="output", first_last=None)

    alone = steps(lq.calibrate(model(), [x]))
    ranks = [model(), model()]
    together = Ranks(2).run(lambda rank, reduce: steps(lq.calibrate(ranks[rank], [x[rank::2]], reduce=reduce)))
    assert all(torch.equal(together[0][name], together[1][name]) for name in alone)
    assert all(torch.allclose(alone[name], together[0][name], atol=0.2) for name in alone)


def test_an_input_that_several_read():
    """It is chosen for all of them, whatever the sizes of their outputs."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            x = x * 2
            return self.small(x) + self.large(x)

    torch.manual_seed(0)
    net, x = Two(), images(SAMPLES, 6)
    with torch.no_grad():
        net.small.weight.mul_(1e-3)
    model = lq.calibrate(attached(net, x, None, 4, range="output", first_last=None), [x])
    (site,) = activation_quantizers(model).values()
    exact = [layer(2 * x) - layer.bias for layer in (net.small, net.large)]

    def error(offset):
        begin = site.log2_step.clone()
        site.log2_step.add_(offset)
        rounded = site(2 * x)
        site.log2_step.copy_(begin)
        weights = [lq.sites.float_weight(layer) for layer in (net.small, net.large)]
        return sum(
            float((rounded @ w.T - y).square().sum() / (y + layer.bias).square().sum())
            for w, y, layer in zip(weights, exact, (net.small, net.large), strict=True)
        )

    with torch.no_grad():
        assert error(0.0) <= 1.01 * min(error(float(offset)) for offset in torch.linspace(-3, 3, 200))


def test_power_of_two_steps_stay_so():
    spec = lq.QuantSpec(4, per_channel=False, symmetric=False, range="output", power_of_two=True)
    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(nn.Identity(), nn.Linear(6, 6), nn.Linear(6, 2)), None, spec, first_last=None)
    step = input_quantizer(lq.calibrate(model, [images(SAMPLES, 6)])[2]).log2_step
    assert float(step) == float(step.round())


def test_weights_alone_need_batches():
    model = lq.attach(nn.Sequential(nn.Linear(6, 6)), 4, None, range="output")
    with pytest.raises(lq.DataError, match="calibration got no batches"):
        lq.calibrate(model)


def test_unknown_rules():
    with pytest.raises(
        lq.SpecError,
        match=r"range='outputs' is unknown; use 'auto', 'minmax', 'percentile', 'lp', 'lsq', .*'output'.* or a rule",
    ):
        lq.attach(nn.Sequential(nn.Linear(2, 2)), 4, range="outputs")
