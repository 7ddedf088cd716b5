"""Calibration: the same ranges in any order and split; one huge token does not set them; bad data is named."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.histogram import Histogram
from lq.ranges import Levels, Lp, MinMax, Percentile, Samples
from lq.sites import input_quantizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def levels(bits: int, signed: bool = True, symmetric: bool = True) -> Levels:
    return Levels(torch.tensor([float(bits)]), symmetric, signed)


@pytest.mark.parametrize("tokens", [False, True])
def test_histogram_depends_on_the_values_alone(tokens) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 6, generator=generator) * 10.0**k for k in (-2, 1, 0, 2)]
    whole, backwards = Histogram(tokens=tokens), Histogram(tokens=tokens)
    halves = Histogram(tokens=tokens), Histogram(tokens=tokens)
    for i, batch in enumerate(batches):
        whole.update(batch)
        backwards.update(batches[-1 - i])
        halves[i % 2].update(batch)
    ends = [torch.tensor([-h.low, h.high, h.exponent, -h.octave, h.octave + len(h.counts) - 1]) for h in halves]

    def over_ranks(tensor: torch.Tensor, operation: str) -> torch.Tensor:
        if operation == "max":
            return torch.maximum(*ends).to(tensor)
        other = halves[1]._make_room(halves[0].exponent, halves[0].octave, halves[0].octave + len(tensor) - 1, "cpu")
        return tensor + other

    halves[0].reduce(over_ranks, torch.device("cpu"))
    for other in (backwards, halves[0]):
        assert (other.low, other.high, other.exponent, other.octave) == (
            whole.low,
            whole.high,
            whole.exponent,
            whole.octave,
        )
        assert torch.equal(other.counts, whole.counts)
    assert whole.total == sum(batch.numel() for batch in batches)
    assert whole.low == min(float(batch.min()) for batch in batches)


def test_lp_finds_the_best_shrink_by_brute_force() -> None:
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) ** 3
    low, high = Lp()(Samples(values), Levels(torch.full((3,), 3.0), True, True))
    for row, high_found in zip(values.double().numpy(), high.tolist(), strict=True):
        errors = {}
        for i in range(1, 101):
            step = max(row.max() / 3, -row.min() / 4) * i / 100
            rounded = np.clip(np.round(row / step), -4, 3) * step
            errors[i] = (np.abs(rounded - row) ** 2.4).sum()
        best = min(errors, key=errors.get)
        assert high_found / row.max() == pytest.approx(best / 100, abs=0.011)
    assert (low < 0).all()


def test_percentile_is_that_of_numpy() -> None:
    values = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    low, high = Percentile(99.0)(Samples(values), levels(8))
    expected = np.quantile(values.numpy(), [0.01, 0.99], axis=1, method="inverted_cdf")
    np.testing.assert_allclose(high, expected[1], atol=0.05)
    np.testing.assert_allclose(low, expected[0], atol=0.05)


def test_asymmetric_grids_represent_zero_and_unsigned_data_are_found() -> None:
    step, zero_point = levels(4, symmetric=False).fit(torch.tensor([-1.0]), torch.tensor([2.0]))
    assert step.item() == pytest.approx(0.2)
    assert zero_point.item() == 5
    model = lq.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 4, 8)
    lq.calibrate(model, [torch.randn(64, 4)])
    assert input_quantizer(model[2]).zero_point == 0


def test_one_huge_token_does_not_set_the_range_of_the_others() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1000, 64)
    tokens[0] *= 300
    found = {}
    for relative in (True, False):
        histogram = Histogram(tokens=True)
        histogram.update(tokens)
        _, high = Lp(relative=relative)(histogram.samples(), levels(8, symmetric=False))
        found[relative] = float(high)
    assert found[True] < 15
    assert found[False] > 150
    assert float(MinMax()(histogram.samples(), levels(8))[1]) == float(tokens.max())


def test_bad_data_gives_clear_errors() -> None:
    model = lq.attach(net(), 4, 8)
    with pytest.raises(lq.DataError, match="calibration got no batches"):
        lq.calibrate(model, [])
    with pytest.raises(lq.DataError, match=r"did not take a batch of dict\(image: Tensor\(2, 8\)\).*pass forward="):
        lq.calibrate(model, [{"image": torch.zeros(2, 8)}])
    with pytest.raises(lq.DataError, match=r"did not take a batch of Tensor\(2, 9\)"):
        lq.calibrate(model, [torch.zeros(2, 9)])
    lq.calibrate(model, [{"image": torch.randn(2, 8)}], forward=lambda m, batch: m(batch["image"]))
    assert torch.isfinite(model(torch.randn(2, 8))).all()


def test_calibration_restores_modes_and_reads_batches_once() -> None:
    model = lq.attach(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)), 4, 8).train()
    model[1].eval()
    lq.calibrate(model, (torch.randn(8, 4) for _ in range(3)))
    assert model.training
    assert not model[1].training


def test_layers_that_are_never_called_are_told() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(nn.functional.linear(self.a(x), self.b.weight))

    model = lq.attach(Functional(), 4, 8)
    with pytest.warns(lq.NoEffectWarning, match="the inputs of 1 layers were never seen"):
        lq.calibrate(model, [torch.randn(8, 4)])
    assert torch.isfinite(model(torch.randn(2, 4))).all()
