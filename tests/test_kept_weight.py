"""The quantized weight that eval mode keeps: computed once, never stale."""

import copy

import pytest
import torch

import lq
from lq.quantizer import WeightQuantizer
from lq.sites import weight_quantizer
from tests.test_attach import images, quantized, small


@pytest.fixture
def calls(monkeypatch):
    """Names of the weights that were quantized, one entry each time."""
    found = []
    original = WeightQuantizer._quantize

    def quantize(self, weight):
        found.append(self.name)
        return original(self, weight)

    monkeypatch.setattr(WeightQuantizer, "_quantize", quantize)
    return found


CHANGES = {
    "weight": lambda m: m[2].parametrizations.weight.original.mul_(3),
    "step": lambda m: weight_quantizer(m[2]).log2_step.add_(1),
    "bits": lambda m: lq.set_bits(m, {"2": 2}),
    "checkpoint": lambda m: m.load_state_dict(quantized_from(5).state_dict()),
    "mode": lambda m: m.train().eval(),
    "swap": lambda m: swap(m[2].parametrizations.weight.original),
}


def quantized_from(seed):
    return lq.calibrate(lq.attach(small(seed), 4, 8), [images(16, 2)])


def swap(parameter):
    parameter.data = parameter.data * 2


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_kept_weights_follow_changes(change, calls):
    model, x = quantized(), images()
    calls.clear()
    before = model(x)
    assert sorted(calls) == ["0.weight", "2.weight", "5.weight", "6.weight"]
    assert torch.equal(model(x), before)
    assert len(calls) == 4
    CHANGES[change](model)
    after = model(x)
    assert calls.count("2.weight") >= 2
    assert torch.equal(after, before) == (change == "mode")
    fresh = lq.load(copy.deepcopy(model.state_dict()), small()).eval()
    assert torch.equal(fresh(x), after)


def test_kept_weights_are_not_used_with_gradients(calls):
    model = quantized()
    with torch.no_grad():
        model(images())
    model(images()).sum().backward()
    assert model[2].parametrizations.weight.original.grad.abs().sum() > 0


def test_weights_are_quantized_in_float32_under_autocast():
    model, x = quantized(), images()
    plain = [model[i].weight.detach().clone() for i in (0, 2, 5, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [model[i].weight.detach().clone() for i in (0, 2, 5, 6)]
        assert model(x).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert all(w.dtype == torch.float32 for w in inside)


@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_training_under_autocast(estimator):
    model = quantized(estimator=estimator).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_half_precision_models_keep_float32_steps():
    model = quantized(estimator="lsq").to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        kept = name.endswith(("log2_step", "zero_point", "bits"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)
    model.train()(images().bfloat16()).sum().backward()
    assert weight_quantizer(model[0]).log2_step.grad.dtype == torch.float32
