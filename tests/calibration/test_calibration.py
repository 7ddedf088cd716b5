"""Calibration: ranges against the formula, any batches and ranks, and what each error says."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import input_quantizer, quantizers, weight_quantizer
from lq.calibration.calibration import needs_calibration
from lq.errors import DataError, NoEffectWarning
from lq.structure.forward import describe, eval_mode
from tests.quantizer.test_histogram import Ranks

MINMAX = lq.QuantSpec(8, per_channel=False, symmetric=False, range="minmax")


class Network(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def attached(activations=MINMAX, first=MINMAX):
    """A network whose two inputs are both quantized."""
    torch.manual_seed(0)
    return lq.attach(Network(), 4, activations, overrides={"first": {"activations": first}} if first else None)


def batches_of(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=generator) * (i + 1) for i, n in enumerate(sizes)]


def ranges(model):
    return {q.name: (q.log2_step.clone(), q.zero_point.clone()) for q in quantizers(model)}


def assert_same_ranges(a, b):
    a, b = ranges(a), ranges(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_ranges_are_those_of_the_data():
    batches = batches_of(8, 3, 5)
    model = lq.calibrate(attached(), batches)
    x = torch.cat(batches)
    step = (x.max() - x.min()).item() / 255
    site = input_quantizer(model.first)
    assert site.step.item() == pytest.approx(step, rel=1e-6)
    assert site.zero_point.item() == round(-x.min().item() / step)
    with torch.no_grad():
        hidden = nn.functional.linear(x, model.first.weight, model.first.bias).relu()
    site = input_quantizer(model.second)
    assert site.zero_point == 0
    assert site.step.item() == pytest.approx(hidden.max().item() / 255, rel=1e-5)
    assert torch.equal(weight_quantizer(model.first).log2_step, weight_quantizer(attached().first).log2_step)


@pytest.mark.parametrize("activations", [4, 8, MINMAX])
def test_order_and_batches_do_not_matter(activations):
    batches = batches_of(8, 3, 5)
    whole = lq.calibrate(attached(activations), [torch.cat(batches)])
    assert_same_ranges(lq.calibrate(attached(activations), iter(batches)), whole)
    assert_same_ranges(lq.calibrate(attached(activations), batches[::-1]), whole)


def test_two_ranks_find_the_ranges_of_one():
    batches = batches_of(8, 3, 5)
    one = lq.calibrate(attached(8), batches)
    models = [attached(8), attached(8)]
    Ranks(2).run(lambda rank, reduce: lq.calibrate(models[rank], batches[rank::2], reduce=reduce))
    for model in models:
        assert_same_ranges(model, one)


@pytest.mark.parametrize("pack", [tuple, list])
def test_labels_are_not_used(pack):
    batches = batches_of(8, 3)
    model = lq.calibrate(attached(), [pack([x, "label"]) for x in batches])
    assert_same_ranges(model, lq.calibrate(attached(), batches))


def test_other_batches_need_a_forward():
    batches = batches_of(8, 3)
    model = lq.calibrate(attached(), [{"image": x} for x in batches], forward=lambda m, batch: m(batch["image"]))
    assert_same_ranges(model, lq.calibrate(attached(), batches))


def test_parts_of_a_batch_are_known_by_name():
    batches = batches_of(8, 3)
    model = lq.calibrate(attached(), [{"label": 1, "x": x} for x in batches])
    assert_same_ranges(model, lq.calibrate(attached(), batches))


def test_ranges_of_before_are_kept_where_nothing_comes():
    model = lq.calibrate(attached(), batches_of(8, 3))
    before = ranges(model)["second.input"]
    with pytest.warns(NoEffectWarning, match=r"\(second.input\): they keep the range that they had"):
        lq.calibrate(model, batches_of(5), forward=lambda m, x: m.first(x))
    after = ranges(model)["second.input"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_calibrating_again_starts_anew():
    model = lq.calibrate(attached(), [100 * x for x in batches_of(8, 3)])
    assert_same_ranges(lq.calibrate(model, batches_of(8, 3)), lq.calibrate(attached(), batches_of(8, 3)))


def test_weights_are_calibrated_as_they_are_now():
    model = attached()
    before = weight_quantizer(model.second).log2_step.clone()
    with torch.no_grad():
        model.second.parametrizations.weight.original.mul_(4)
    lq.calibrate(model, batches_of(8))
    torch.testing.assert_close(weight_quantizer(model.second).log2_step, before + 2)


def test_weights_alone_need_no_batches():
    model = lq.attach(Network(), 4)
    with torch.no_grad():
        weight_quantizer(model.first).log2_step.fill_(9)
    lq.calibrate(model)
    assert not needs_calibration(model)
    assert (weight_quantizer(model.first).log2_step < 9).all()


def test_needs_calibration():
    model = attached()
    assert needs_calibration(model)
    assert not needs_calibration(lq.calibrate(model, batches_of(8)))


def test_modes_and_gradients_are_restored():
    model = attached().train()
    model.second.eval()
    seen = []
    model.first.register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_grad_enabled())))
    lq.calibrate(model, batches_of(8, 3))
    assert seen == [(False, False)] * 2
    assert (model.training, model.first.training, model.second.training) == (True, True, False)


def test_eval_mode_restores_after_an_error():
    model = Network()

    def fail():
        with eval_mode(model):
            assert not model.first.training
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert model.first.training


def test_inputs_that_are_never_seen_stay_float():
    model = attached()
    with pytest.warns(NoEffectWarning, match=r"1 of 2 activations were never seen in calibration \(second.input\)"):
        lq.calibrate(model, batches_of(8), forward=lambda m, x: m.first(x))
    assert not needs_calibration(model)
    assert input_quantizer(model.first).calibrated
    assert not input_quantizer(model.second).calibrated


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration got no batches: the loader is empty; give lq.calibrate at least one batch"),
        ([torch.ones(2, 7)], r"Network did not take a batch of Tensor\(2, 7\): .*; pass forward=, a callable"),
        (
            [{"z": torch.ones(2, 4), "n": 1}],
            r"batch of dict\(z: Tensor\(2, 4\), n: int\): .*; pass forward=, a callable",
        ),
        ([[]], r"Network did not take a batch of list\(\): the default forward takes a tensor"),
        ([torch.ones(2, 4), torch.full((2, 4), torch.nan)], "^first.input has 8 NaN or Inf of 8 values"),
        ([torch.tensor([[1.0, 2, 3, torch.inf]])], "^first.input has 1 NaN or Inf of 4 values"),
    ],
)
def test_errors(batches, message):
    model = attached().train()
    with pytest.raises(DataError, match=message):
        lq.calibrate(model, batches)
    assert model.training
    assert all(input_quantizer(m).tap is None for m in (model.first, model.second))
    assert_same_ranges(lq.calibrate(model, batches_of(8)), lq.calibrate(attached(), batches_of(8)))


def test_weights_that_are_not_finite():
    model = attached()
    with torch.no_grad():
        model.second.parametrizations.weight.original[1, 2] = torch.nan
    with pytest.raises(DataError, match="^second.weight has 1 NaN or Inf of 18 values"):
        lq.calibrate(model, batches_of(8))


def test_one_huge_token_does_not_set_the_range():
    tokens = torch.randn(16, 20, 4, generator=torch.Generator().manual_seed(3))
    usual = lq.calibrate(attached(8, 8), [tokens])
    huge = tokens.clone()
    huge[3, 7] *= 500
    found = lq.calibrate(attached(8, 8), [huge])
    assert input_quantizer(found.first).step < 3 * input_quantizer(usual.first).step


def test_describe():
    assert describe((torch.ones(1), [2.0])) == "tuple(Tensor(1,), list(float))"
