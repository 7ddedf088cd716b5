"""Attach and detach are inverses on every layer kind; patterns, widths, copies, export, the weight cache."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.sites import input_quantizer, weight_quantizer

LAYERS = [
    (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 5, 5, 5)),
    (lambda: nn.Linear(4, 6), (2, 4)),
    (lambda: nn.Embedding(10, 6), None),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def ready(weights: int = 4, activations: int | None = 4, **options: object) -> tuple[nn.Sequential, torch.Tensor]:
    model, images = net(), torch.randn(4, 3, 8, 8)
    return lq.calibrate(lq.attach(model, weights, activations, **options), [images]).eval(), images


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_detach_is_exact_and_weights_take_few_values(build, shape, bits) -> None:
    layer = build()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    parameters, kind = dict(layer.named_parameters()), type(layer)
    lq.attach(layer, weights=bits, first_last=None)
    assert isinstance(layer, kind)
    rows = weight_quantizer(layer).layout.rows(layer.weight.detach())
    assert rows.shape[0] == 10 if isinstance(layer, nn.Embedding) else rows.shape[0] == 6
    assert all(row.unique().numel() <= 2**bits for row in rows)
    if bits == 0:
        assert layer.weight.abs().max() == 0
    lq.detach(layer)
    assert type(layer) is kind
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert all(value is parameters[key] for key, value in layer.named_parameters())
    assert not layer._forward_pre_hooks
    assert not layer._load_state_dict_pre_hooks


@pytest.mark.parametrize("activations", [None, 8])
def test_bake_keeps_the_quantized_forward(activations) -> None:
    model, images = ready(4, activations)
    with torch.no_grad():
        quantized = model(images)
        assert torch.equal(lq.detach(model, bake=True)(images), quantized)
    assert weight_quantizer(model[0]) is None
    if activations is not None:
        lq.detach(model)
    assert not lq.sites.is_attached(model)


def test_first_and_last_layers_have_eight_bits_and_the_input_is_float() -> None:
    model = lq.attach(net(), weights=2, activations=2)
    assert [int(weight_quantizer(model[i]).bits.max()) for i in (0, 2, 5)] == [8, 2, 8]
    assert input_quantizer(model[0]) is None
    assert [int(input_quantizer(model[i]).bits) for i in (2, 5)] == [2, 8]


def test_patterns_choose_layers() -> None:
    model = lq.attach(net(), 4, exclude="2", overrides={"5": {"weights": 3}}, first_last=None)
    assert weight_quantizer(model[2]) is None
    assert int(weight_quantizer(model[5]).bits[0]) == 3
    model = lq.attach(net(), 4, include=["2"])
    assert [weight_quantizer(model[i]) is None for i in (0, 2, 5)] == [True, False, True]


def test_a_pattern_without_a_match_names_near_misses() -> None:
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(
        lq.PatternError, match=r"exclude pattern 'layr1' matches none of the 2 layers; did you mean 'layer1'"
    ):
        lq.attach(model, 4, exclude="layr1")
    with pytest.raises(lq.PatternError, match="include pattern"):
        lq.attach(model, 4, include="nothing*")


@pytest.mark.parametrize("bits", [9, -1, 15, 2.5, True, "4"])
def test_wrong_bits(bits) -> None:
    with pytest.raises(lq.SpecError, match=r"is not a width; use an integer from 0 to 8, or 16"):
        lq.attach(net(), weights=bits)


def test_wrong_states() -> None:
    with pytest.raises(lq.StateError, match="has no layer to quantize"):
        lq.attach(nn.ReLU())
    with pytest.raises(lq.StateError, match="has quantizers already"):
        lq.attach(lq.attach(net()))
    for call in (lq.detach, lq.calibrate, lq.summary):
        with pytest.raises(lq.StateError, match="needs a model with quantizers"):
            call(net())
    with pytest.raises(lq.StateError, match=r"2.input has no range yet: run lq.calibrate"):
        lq.attach(net(), 4, 4)(torch.randn(1, 3, 8, 8))
    with pytest.raises(lq.SpecError, match="leave nothing to quantize"):
        lq.attach(net(), None, None)


def test_copies_have_quantizers_of_their_own() -> None:
    model, images = ready()
    with torch.no_grad():
        expected = model(images)
        other = copy.deepcopy(model)
        lq.detach(model)
        assert torch.equal(other(images), expected)
        third = copy.deepcopy(other)
        lq.set_bits(other, {"2": 1})
        assert torch.equal(third(images), expected)
        assert not torch.equal(other(images), expected)


def test_export_gives_the_same_numbers() -> None:
    model, images = ready()
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        assert torch.equal(exported(images), model(images))


def test_mixed_widths_in_one_tensor() -> None:
    model, _ = ready(4, None, first_last=None)
    lq.set_bits(model, {"2": [0, 1, 2, 3, 4, 5, 8, 16]})
    rows = model[2].weight.detach().flatten(1)
    assert all(row.unique().numel() <= 2**bits for row, bits in zip(rows, (0, 1, 2, 3, 4, 5, 8, 16), strict=True))
    assert rows[0].abs().max() == 0
    assert rows[1].unique().numel() == 2
    assert rows[1].unique().sum() == 0
    with pytest.raises(lq.SpecError, match=r"3 widths were given for 8 channels"):
        lq.set_bits(model, {"2": [1, 2, 3]})


def test_the_quantized_weight_is_kept_until_something_changes(monkeypatch) -> None:
    model, images = ready()
    calls = []
    kept = lq.quantizer.WeightQuantizer._quantize
    monkeypatch.setattr(
        lq.quantizer.WeightQuantizer, "_quantize", lambda self, w: calls.append(self.name) or kept(self, w)
    )
    with torch.no_grad():
        first = model(images)
        count = len(calls)
        assert torch.equal(model(images), first)
        assert len(calls) == count == 3
        model[2].parametrizations.weight.original.mul_(2)
        assert not torch.equal(model(images), first)
        assert len(calls) == count + 1
        weight_quantizer(model[2]).log2_step.add_(1)
        model(images)
        assert len(calls) == count + 2
        model.train().eval()(images)
        assert len(calls) == 2 * count + 2
    model(images)
    assert len(calls) == 3 * count + 2


def test_half_precision_leaves_the_grid_alone() -> None:
    model, images = ready()
    with torch.no_grad():
        expected = model[2].weight.clone()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model[2].weight, expected)
    model.to(torch.bfloat16)
    assert weight_quantizer(model[2]).log2_step.dtype == torch.float32
    assert model(images.bfloat16()).dtype == torch.bfloat16


def test_not_finite_numbers_are_named() -> None:
    broken = net()
    broken[2].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(lq.DataError, match=r"2.weight has 1 NaN or Inf of 576 values"):
        lq.attach(broken)
    model, images = ready()
    images[0, 0, 0, 0] = torch.inf
    with pytest.raises(lq.DataError, match=r"2.input has \d+ NaN or Inf"):
        model(images)
    with pytest.raises(lq.DataError, match=r"2.input has \d+ NaN or Inf"):
        lq.calibrate(model, [images])


def test_steps_stay_positive_whatever_moves_them() -> None:
    model, images = ready(estimator="lsq")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
    model.train()(images).square().sum().backward()
    optimizer.step()
    steps = torch.cat([q.step.flatten() for q in lq.sites.quantizers(model)])
    assert (steps > 0).all()
    assert torch.isfinite(steps).all()
