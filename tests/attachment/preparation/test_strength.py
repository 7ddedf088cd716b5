"""By how much channels are rescaled: the predicted error, and weights of one range."""

import torch
import torch.nn.functional as F

from lq.attachment.preparation.channel_ranges import ChannelRanges
from lq.attachment.preparation.parts import Maker, Pair, Reader
from lq.attachment.preparation.strength import POWERS, Widths, _error, by_ranges, by_weights

LINEAR = Pair("n", "norm", Maker("n.weight", "n.bias"), (Reader("a.weight", "a.bias"),), 8)


def counted(x, pair):
    ranges = ChannelRanges(pair.channels, -1, "x")
    ranges.update(x)
    return ranges


def uneven_channels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20000, 8, generator=generator) * torch.tensor([0.05, 0.1, 0.3, 1, 1, 2, 5, 20]) + 1


def rounded(values, step, axis=None):
    return (values / step).round() * step


def measured(x, weight, scale, shift, widths):
    """Mean squared error of the outputs, summed over them, with grids as the prediction has them."""
    y, w = (x / scale + shift).double(), (weight * scale).double()
    exact = y @ w.T
    quantized, rounded_weight = y, w
    if widths.activations:
        low, high = torch.quantile(y, torch.tensor([0.001, 0.999], dtype=torch.float64), dim=0)
        step = float(max(high.max(), 0.0) - min(low.min(), 0.0)) / (2**widths.activations - 1)
        quantized = rounded(y, step)
    if widths.weights:
        steps = w.abs().amax(1, keepdim=True) / (2 ** (widths.weights - 1) - 0.5)
        rounded_weight = rounded(w, steps)
    return float((quantized @ rounded_weight.T - exact).square().mean(0).sum())


def test_the_prediction_is_near_what_rounding_does():
    x = uneven_channels()
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    ranges = counted(x, LINEAR)
    low, high = ranges.quantiles(0.001, 0.999)
    for widths in (Widths(None, 6), Widths(6, None), Widths(6, 6)):
        for scale in (torch.ones(8), torch.rand(8) + 0.5):
            shift = torch.randn(8)
            given = _error(LINEAR, ranges, low, high, {"a.weight": weight}, widths, scale, shift)
            expected = measured(x, weight, scale, shift, widths)
            assert 0.6 * expected < given < 1.7 * expected, widths


def test_the_power_depends_on_the_widths():
    x, weight = uneven_channels(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    ranges, weights = counted(x, LINEAR), {"a.weight": weight}
    powers = [by_ranges(LINEAR, ranges, weights, Widths(*both))[2] for both in ((8, 2), (4, 4), (2, 8))]
    assert powers == sorted(powers, reverse=True)
    assert powers[0] >= 0.75
    assert powers[-1] < 1.0
    scale, shift, power = by_ranges(LINEAR, ranges, weights, Widths(None, None))
    assert power in POWERS
    assert bool(scale.isfinite().all())
    assert bool(shift.isfinite().all())


def test_channels_without_a_range():
    x = uneven_channels()
    x[:, 0] = 3
    weights = {"a.weight": torch.randn(4, 8)}
    scale, shift, _ = by_ranges(LINEAR, counted(x, LINEAR), weights, Widths(4, 4), power=1)
    assert float(scale.min()) >= 2.0**-8
    assert bool(shift.isfinite().all())
    scale, shift, power = by_ranges(LINEAR, counted(torch.zeros(9, 8), LINEAR), weights, Widths(4, 4))
    assert power == 0
    assert bool((scale == 1).all())
    assert not shift.any()


def test_readers_of_every_kind():
    """Rescaled weights give what the old ones did, and largest values are those of a loop."""
    torch.manual_seed(0)
    x, scale, shift = torch.randn(2, 8, 5, 5), torch.rand(8) + 0.5, torch.randn(8)
    y = x / scale.view(8, 1, 1) + shift.view(8, 1, 1)
    for groups, out in ((1, 4), (2, 4), (8, 8), (8, 16)):
        reader, weight, bias = (
            Reader("a.weight", "a.bias", groups),
            torch.randn(out, 8 // groups, 3, 3),
            torch.randn(out),
        )
        new = reader.scaled(weight, scale), reader.shifted(bias, weight, scale, shift)
        old = F.conv2d(x, weight, bias, groups=groups)
        assert torch.allclose(F.conv2d(y, *new, groups=groups), old, atol=1e-4)
        assert reader.channels(weight) == 8
        largest = torch.zeros(8)
        for o in range(out):
            for c in range(8 // groups):
                channel = o // (out // groups) * (8 // groups) + c
                largest[channel] = torch.maximum(largest[channel], weight[o, c].abs().max())
        assert torch.equal(reader.largest(weight), largest)
    for groups in (1, 2):
        reader, weight = Reader("a.weight", None, groups, transposed=True), torch.randn(8, 3, 2, 2)
        old = F.conv_transpose2d(x, weight, groups=groups)
        found = F.conv_transpose2d(x / scale.view(8, 1, 1), reader.scaled(weight, scale), groups=groups)
        assert torch.allclose(found, old, atol=1e-4)
        assert torch.equal(reader.largest(weight), weight.abs().amax((1, 2, 3)))


def test_weights_of_one_range():
    pair = Pair("a", "layer", Maker("a.weight", "a.bias"), (Reader("b.weight", None), Reader("c.weight", None)), 4)
    weights = {
        name: torch.randn(shape) for name, shape in (("a.weight", (4, 3)), ("b.weight", (5, 4)), ("c.weight", (2, 4)))
    }
    scale = by_weights(pair, weights)
    both = torch.cat([weights["b.weight"], weights["c.weight"]])
    assert torch.allclose((weights["a.weight"].abs().amax(1) / scale), (both.abs().amax(0) * scale))
    weights["a.weight"][0] = 0
    assert float(by_weights(pair, weights)[0]) == 1
