"""The quantized weight that eval mode keeps: computed once, never stale."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.sites import float_weight, weight_quantizer
from lq.quantizer.weight_quantizer import WeightQuantizer
from tests.attachment.networks import images, quantized, small


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
    "data": lambda m: m[2].parametrizations.weight.original.data.mul_(2),
    "one value": lambda m: one_value(m[2].parametrizations.weight.original.data),
    "another order": lambda m: m[2].parametrizations.weight.original.data.copy_(float_weight(m[2]).flip(-1)),
    "numpy": lambda m: np.multiply(original(m[2]), 2, out=original(m[2])),
    "step's data": lambda m: weight_quantizer(m[2]).log2_step.data.add_(1),
}


def original(layer):
    return layer.parametrizations.weight.original.detach().numpy()


def one_value(data):
    data[2, 1, 1, 1] = -10.0


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


@torch.no_grad()
@pytest.mark.parametrize("change", ["data", "one value", "another order"])
def test_kept_weights_in_other_orders_of_memory(change, calls):
    model, x = quantized().to(memory_format=torch.channels_last), images()
    model(x)
    calls.clear()
    before = model(x)
    assert not calls
    CHANGES[change](model)
    fresh = copy.deepcopy(model)
    assert torch.equal(model(x), fresh(x))
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_nothing_is_kept_of_half_precision(calls):
    """A sum of bfloat16 values would not change with each of them."""
    model, x = quantized().bfloat16(), images().bfloat16()
    model(x)
    calls.clear()
    model(x)
    assert len(calls) == 4


# --- writes into the quantized weight ---------------------------------------------------------------------------------


class Lora(nn.Linear):
    """A layer that merges an adapter into its own weight in eval mode, and takes it out in training."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs) / 2), nn.Parameter(torch.randn(outputs, 2) / 2)
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("bits", [8, 3])
def test_adapters_are_merged_and_taken_out(bits):
    torch.manual_seed(0)
    layer = Lora(6, 4).train()
    before = layer.weight.detach().clone()
    merged = before + layer.up.detach() @ layer.down.detach()
    net = nn.Sequential(layer)
    lq.attach(net, bits, None, first_last=None)
    for _ in range(5):
        net.eval()
        torch.testing.assert_close(float_weight(layer).detach(), merged, atol=1e-5, rtol=0)
        reference = lq.attach(nn.Sequential(nn.Linear(6, 4)), bits, None, first_last=None)
        reference.load_state_dict({"0.weight": merged, "0.bias": layer.bias})
        torch.testing.assert_close(layer.weight, reference[0].weight)  # the range is that of the merged weight
        net.train()
        torch.testing.assert_close(float_weight(layer).detach(), before, atol=1e-5, rtol=0)


WRITES = {
    "copy_": lambda layer, new: layer.weight.data.copy_(new),
    "data": lambda layer, new: setattr(layer.weight, "data", new),
    "no_grad": lambda layer, new: layer.weight.copy_(new),
    "one row": lambda layer, new: layer.weight.data[1].copy_(new[1]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_what_is_written_is_taken_over(write, training):
    torch.manual_seed(0)
    net = lq.attach(nn.Sequential(nn.Linear(6, 4)).train(training), 8, None, first_last=None)
    before, new = float_weight(net[0]).detach().clone(), torch.randn(4, 6)
    half_step = weight_quantizer(net[0]).step.view(-1, 1) / 2
    WRITES[write](net[0], new)
    saved = net.state_dict()["0.parametrizations.weight.original"]
    written = torch.arange(4) == 1 if write == "one row" else torch.ones(4, dtype=torch.bool)
    assert ((saved - new).abs() <= 1.001 * half_step)[written].all()
    assert torch.equal(saved[~written], before[~written])
    expected = lq.attach(nn.Sequential(nn.Linear(6, 4)), 8, None, first_last=None)
    expected.load_state_dict({"0.weight": saved, "0.bias": net[0].bias})
    x = torch.randn(3, 6)
    assert torch.equal(net(x), expected(x))


@torch.no_grad()
def test_zeros_that_are_written_are_zeros():
    torch.manual_seed(0)
    net = lq.attach(nn.Sequential(nn.Linear(6, 4)), 4, None, first_last=None)
    mask = torch.rand(4, 6) < 0.5
    net[0].weight.data.masked_fill_(mask, 0.0)
    assert (float_weight(net[0]) == 0)[mask].all()
    assert (net[0].weight == 0)[mask].all() and net[0].weight.any()
    nn.init.zeros_(net[0].weight)
    assert not net[0].weight.any()


OVERWRITES = {
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, std=0.02, generator=torch.Generator().manual_seed(1)),
    "clamp_": lambda w: w.data.clamp_(-0.05, 0.05),
    "fill_": lambda w: w.data.fill_(0.3),
    "one value": lambda w: w.data[3, 1, 0].__setitem__(0, 0.7),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", OVERWRITES)
def test_what_is_overwritten_has_nothing_of_the_old_rounding_error(write, training):
    """At two bits a step is large against what is written here."""
    torch.manual_seed(0)
    net = lq.attach(nn.Sequential(nn.Conv2d(8, 8, 3)).train(training), 2, None, first_last=None)
    old, rounded = float_weight(net[0]).detach().clone(), net[0].weight.detach().clone()
    new = rounded.clone()
    OVERWRITES[write](new)
    OVERWRITES[write](net[0].weight)
    found, written = float_weight(net[0]).detach(), new != rounded
    assert torch.equal(found[written], new[written])
    if write == "one value":
        assert torch.equal(found[~written], old[~written])


@pytest.mark.parametrize("training", [True, False])
def test_averages_are_swapped_in_and_out_through_the_quantized_weight(training):
    torch.manual_seed(0)
    net = lq.attach(nn.Sequential(nn.Linear(32, 16)).train(training), 3, None, first_last=None)
    saved = float_weight(net[0]).detach().clone()
    average = saved + 0.01 * torch.randn(16, 32)
    net[0].weight.data.copy_(average)
    assert torch.equal(float_weight(net[0]), average)
    net[0].weight.data.copy_(saved)
    assert torch.equal(float_weight(net[0]), saved)


FACTORS = {"number": torch.tensor(0.1), "rows": torch.rand(8, 1) + 0.01, "columns": torch.rand(1, 12) + 0.01}


@pytest.mark.parametrize("factor", FACTORS)
def test_scaling_scales_the_float_weight(factor):
    """Equalization of channels, decay by hand: the rounding error is scaled along."""
    torch.manual_seed(0)
    net = lq.attach(nn.Sequential(nn.Linear(12, 8)), 4, None, first_last=None)
    before = float_weight(net[0]).detach().clone()
    net[0].weight.data.mul_(FACTORS[factor])
    torch.testing.assert_close(float_weight(net[0]).detach(), before * FACTORS[factor], atol=1e-6, rtol=1e-5)


def test_clipped_values_come_back_when_an_adapter_is_taken_out():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    lq.attach(nn.Sequential(layer), 4, None, first_last=None)
    with torch.no_grad():
        weight_quantizer(layer).log2_step.sub_(2.0)  # three quarters of the range are clipped
    before, adapter = float_weight(layer).detach().clone(), 0.1 * torch.randn(16, 32)
    layer.weight.data += adapter
    torch.testing.assert_close(float_weight(layer).detach(), before + adapter, atol=1e-5, rtol=0)
    layer.weight.data -= adapter
    torch.testing.assert_close(float_weight(layer).detach(), before, atol=1e-5, rtol=0)


def test_what_is_written_is_in_copies_and_stays_when_quantizers_are_taken_off():
    net = quantized()
    expected = 2 * float_weight(net[0]).detach()
    net[0].weight.data.mul_(2.0)
    copied = copy.deepcopy(net)
    torch.testing.assert_close(float_weight(copied[0]).detach(), expected)
    torch.testing.assert_close(lq.detach(net)[0].weight.detach(), expected)


@torch.no_grad()
def test_reading_changes_nothing():
    net, x = quantized(), images()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    read = [net[i].weight for i in (0, 2, 5, 6)]
    expected = net(x)
    for weight in read:
        weight.zero_()  # after its next use it is a tensor like any other
    assert torch.equal(net(x), expected)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


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
