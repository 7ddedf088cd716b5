"""Levels that halve: against a table of all levels, gradients by hand, and all that other parts do with a quantizer."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import activation_quantizers
from lq.quantizer.log2_quantizer import Log2Quantizer, round_to_log2
from lq.sensitivity.tensors import MeasuredTensor
from tests.models import Attention, Block

SPEC = lq.QuantSpec(4, per_channel=False, symmetric=False, levels="log2")


def quantized(net=None, x=None, bits=4, **options):
    """A block whose probabilities have levels that halve, calibrated, and what it was calibrated on."""
    torch.manual_seed(0)
    net, x = Block() if net is None else net, torch.randn(16, 5, 8) if x is None else x
    structure = lq.inspect(net, x[:2])
    lq.attach(net, bits, bits, structure=structure, probabilities="log2", first_last=None, **options)
    return lq.calibrate(net, [x]), x


def probabilities(model):
    """The quantizers whose levels halve."""
    return [q for q in activation_quantizers(model).values() if isinstance(q, Log2Quantizer)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_values_become_the_nearest_level_in_logarithms(bits):
    scale = 0.7
    levels = [scale * 2.0**-code for code in range(2**bits - 1)]
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)).pow(6)
    boundary = levels[-1] / math.sqrt(2)  # below it: the last code, which is zero
    nearest = [min(levels, key=lambda level: abs(math.log2(level / v))) if v >= boundary else 0.0 for v in x.tolist()]
    assert torch.allclose(round_to_log2(x, torch.tensor(scale), float(bits)), torch.tensor(nearest))
    assert round_to_log2(torch.tensor([5.0, -1.0, 0.0]), torch.tensor(scale), float(bits)).tolist() == [
        pytest.approx(scale),
        0.0,
        0.0,
    ]


def test_gradients():
    """Straight through below the largest level; to it, the error below and all of the gradient above."""
    quantizer = Log2Quantizer(SPEC)
    quantizer.set_estimator("lsq")
    with torch.no_grad():
        quantizer.log2_step.fill_(-1.0)
    quantizer.refresh()
    x = torch.tensor([[0.3, 0.11, 0.9]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 4.0]])
    (quantizer(x) * weights).sum().backward()
    rounded = torch.tensor([0.25, 0.125, 0.5])
    assert x.grad.tolist() == [[1.0, 2.0, 0.0]]
    to_scale = ((rounded - x.detach()[0]) / 0.5 * weights[0] * torch.tensor([1.0, 1.0, 0.0])).sum() + 4.0
    scale = float(quantizer.estimator.gradient_scale(3.0, 15.0))
    assert float(quantizer.log2_step.grad) == pytest.approx(float(to_scale) * 0.5 * math.log(2) * scale, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_only_probabilities_get_them(fused):
    model, _ = quantized(Attention(fused=fused))
    (found,) = probabilities(model)
    assert found.name == "matmul_1_left"
    assert found.spec.levels == "log2"


def test_two_bits_of_probabilities_cost_less_than_uniform_ones():
    torch.manual_seed(0)
    net, x = Attention(), torch.randn(16, 12, 8)
    with torch.no_grad():
        net.q.weight.mul_(4)
    exact, errors = net(x), {}
    for levels in ("uniform", "log2"):
        model = copy.deepcopy(net)
        structure = lq.inspect(model, x[:2])
        spec = {"matmul_1": {"activations": 3}}
        lq.attach(model, None, None, structure=structure, probabilities=levels, overrides=spec)
        errors[levels] = float((lq.calibrate(model, [x])(x) - exact).detach().square().mean())
    assert errors["log2"] < errors["uniform"]


def test_checkpoints_know_them(tmp_path):
    model, x = quantized()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = lq.load(tmp_path / "model.pt", Block()).eval()
    assert len(probabilities(loaded)) == 1
    assert torch.equal(loaded(x), model.eval()(x))


def test_packed_files_know_them(tmp_path):
    model, x = quantized()
    lq.save(model, tmp_path / "model.safetensors")
    loaded = lq.load(tmp_path / "model.safetensors", Block()).eval()
    assert len(probabilities(loaded)) == 1
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-6)


def test_a_uniform_checkpoint_takes_their_place():
    model, x = quantized()
    torch.manual_seed(0)
    other = lq.calibrate(lq.attach(Block(), 4, 4, structure=lq.inspect(Block(), x[:2]), first_last=None), [x])
    loaded = lq.load(other.state_dict(), model).eval()
    assert not probabilities(loaded)
    assert torch.equal(loaded(x), other.eval()(x))


def test_structures_in_files_know_what_softmax_gives(tmp_path):
    structure = lq.inspect(Block(), torch.randn(2, 5, 8))
    (tmp_path / "structure.json").write_text(structure.to_json())
    loaded = lq.Structure.load(tmp_path / "structure.json")
    assert [site.name for site in loaded.sites if site.probabilities] == ["attn.matmul_1_left"]


def test_other_widths_keep_the_largest_level():
    model, _ = quantized()
    (site,) = probabilities(model)
    before = float(site.step)
    lq.set_bits(model, {}, {"attn.matmul_1_left": 2})
    assert int(site.bits) == 2
    assert float(site.step) == before
    with torch.no_grad():
        assert site(torch.rand(1000)).unique().numel() == 4


def test_sensitivities_are_those_of_their_levels():
    model, x = quantized(bits=8)
    (site,) = probabilities(model)
    measured = MeasuredTensor(site, (2, 4), keep=False)
    values, delta = torch.rand(6, 2, 5, 5), torch.randn(6, 2, 5, 5)
    changes = [round_to_log2(values, site.step, float(width)) - values for width in (2, 4)]
    expected = torch.stack([(change * delta).flatten(1).sum(1) for change in changes], 1)
    assert torch.allclose(measured.activation_terms(values, delta, 6).squeeze(1), expected, atol=1e-5)
    assert torch.allclose(measured.rounded(values, 4), changes[1] + values, atol=1e-6)
    found = lq.measure_sensitivity(model, [x], "output_distortion", widths=(1, 4))
    assert found[site.name].loss[0] > found[site.name].loss[1] > 0


def test_fine_tuning_and_what_is_refused():
    model, x = quantized()
    lq.set_estimator(model, "lsq")
    (site,) = probabilities(model)
    model.train()(x).square().mean().backward()
    assert site.log2_step.grad.isfinite().all() and float(site.log2_step.grad) != 0
    for name in ("noise_scale", "ewgs"):
        with pytest.raises(lq.SpecError, match="has levels that halve, which the estimator"):
            lq.set_estimator(model, name)
    lq.set_estimator(model, "stableqat")  # of weights alone
    assert site.estimator == lq.quantizer.estimators.LSQ()


def test_reconstruction_learns_the_largest_level():
    model, x = quantized()
    (site,) = probabilities(model)
    before = float(site.log2_step)
    lq.reconstruct(model, [x], units="network", iterations=30, batch_size=8, activation_mode="learned", step_lr=1e-2)
    assert float(site.log2_step) != before


def test_onnx_gives_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = quantized()
    lq.export_onnx(model, x[:2], tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    with torch.no_grad():
        expected = model.eval()(x[:2]).numpy()
    assert np.abs(output - expected).max() < 1e-4 * np.abs(expected).max()


def test_copies():
    model, x = quantized()
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lq.QuantSpec(4, levels="log3"), "levels='log3' is unknown; use 'uniform' or 'log2'"),
        (lambda: lq.QuantSpec(4, levels="log2"), "levels='log2' is for activations, which are quantized per tensor"),
        (lambda: lq.attach(nn.Linear(2, 2), 4, probabilities="log3"), "probabilities='log3' is unknown"),
    ],
)
def test_what_does_not_exist(make, message):
    with pytest.raises(lq.SpecError, match=message):
        make()


def test_they_need_a_structure():
    with pytest.raises(lq.StateError, match="probabilities='log2' needs to know how the tensors flow"):
        lq.attach(nn.Sequential(nn.Linear(2, 2)), 4, 4, probabilities="log2")
