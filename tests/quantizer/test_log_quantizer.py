"""Logarithmic levels: against a table of all, gradients by hand, and all that other parts do with a quantizer."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import activation_quantizers
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.quantizer.log_quantizer import LogGrid, LogQuantizer
from lq.quantizer.ranges import Samples
from lq.sensitivity.tensors import MeasuredTensor
from tests.models import Attention, Block

SPEC = lq.QuantSpec(4, per_channel=False, symmetric=False, levels="log2")


def round_to_log2(x, scale, bits):
    """`x` rounded to levels that halve."""
    return LogGrid(scale, torch.tensor(1.0)).rounded(x, bits)


def quantized(net=None, x=None, bits=4, weights=4, **options):
    """A block whose probabilities have levels that halve, calibrated, and what it was calibrated on."""
    torch.manual_seed(0)
    net, x = Block() if net is None else net, torch.randn(16, 5, 8) if x is None else x
    structure = lq.inspect(net, x[:2])
    options = {"probabilities": "log2", "first_last": None} | options
    lq.attach(net, weights, bits, structure=structure, **options)
    return lq.calibrate(net, [x]), x


def probabilities(model):
    """The quantizers with logarithmic levels."""
    return [q for q in activation_quantizers(model).values() if isinstance(q, LogQuantizer)]


def quantized_mlp(**options):
    """A block with a quantizer with logarithmic levels behind its GELU, calibrated, what it was calibrated on, it."""
    model, x = quantized(probabilities="uniform", gelu="log", **options)
    return model, x, model.mlp[2].input_quantizer


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
    quantizer = LogQuantizer(SPEC)
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


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_become_the_nearest_level_of_a_base_with_a_shift(bits):
    scale, base, shift, rest = 1.3, 0.4, 0.17, -0.05
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.3
    expected = []
    for value in x.tolist():
        moved = value + shift
        code = 2**bits - 1 if moved <= 0 else max(0, round(math.log2(scale / moved) / base))
        expected.append(rest if code >= 2**bits - 1 else scale * 2 ** (-base * code) - shift)
    grid = LogGrid(*map(torch.tensor, (scale, base, shift, rest)))
    assert torch.allclose(grid.rounded(x, float(bits)), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("function", [nn.functional.gelu, nn.functional.silu])
def test_fitted_levels_are_nearer_than_uniform_ones(function):
    x = function(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    errors = {}
    for levels in ("uniform", "log"):
        spec = lq.QuantSpec(4, per_channel=False, symmetric=False, levels=levels)
        quantizer = (LogQuantizer if levels == "log" else ActivationQuantizer)(spec, tokens=True)
        histogram = quantizer.observe()
        quantizer(x)
        quantizer.tap = None
        quantizer.calibrate(histogram)
        errors[levels] = float((quantizer(x) - x).square().mean())
    assert errors["log"] < 0.7 * errors["uniform"]


def test_fitted_levels_have_the_least_error_nearby():
    """Moving s, the base or what the last code stands for makes the error no less."""
    x = nn.functional.gelu(torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    found = LogQuantizer(replace(SPEC, levels="log"))._fitted(Samples(x[None]), 4.0)

    def error(grid):
        return float((grid.rounded(x, 4.0) - x).square().mean())

    assert found.shift == pytest.approx(-float(x.min()))
    least = error(found)
    assert all(error(found._replace(rest=found.rest + change)) > least for change in (-0.01, 0.01))
    assert all(error(found._replace(base=found.base * change)) > least for change in (0.8, 1.25))
    assert all(error(found._replace(scale=found.scale * change)) > least for change in (0.6, 1.6))


@pytest.mark.parametrize("function", [nn.GELU(), nn.SiLU(), nn.SiLU(inplace=True), nn.Hardswish(), nn.ReLU()])
def test_what_a_gelu_gives_gets_a_base_and_a_shift(function):
    net = nn.Sequential(nn.Linear(8, 16), function, nn.Dropout(), nn.Linear(16, 8))
    model, _ = quantized(net, probabilities="uniform", gelu="log")
    assert isinstance(model[3].input_quantizer, LogQuantizer) == (not isinstance(function, nn.ReLU))
    assert len(probabilities(model)) == isinstance(model[3].input_quantizer, LogQuantizer)


def test_fitted_levels_go_everywhere(tmp_path):
    """Checkpoints, packed files and copies give what the model gives."""
    model, x, site = quantized_mlp()
    assert float(site.log_shift) > 0
    expected = model.eval()(x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    lq.save(model, tmp_path / "model.safetensors")
    for path in ("model.pt", "model.safetensors"):
        loaded = lq.load(tmp_path / path, Block()).eval()
        assert loaded.mlp[2].input_quantizer.fits_base
        assert torch.allclose(loaded(x), expected, atol=1e-6)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_fitted_levels_at_other_widths():
    model, x, site = quantized_mlp(bits=8)
    measured = MeasuredTensor(site, (2, 4), keep=False)
    values, delta = nn.functional.gelu(torch.randn(6, 5, 16)), torch.randn(6, 5, 16)
    found = measured.activation_terms(values, delta, 6).squeeze(1)
    for column, width in enumerate((2, 4)):
        other = quantized_mlp(bits=width)[2]  # the same values: nothing before it is rounded in calibration
        assert torch.allclose(measured.rounded(values, width), other(values), atol=1e-6)
        expected = ((other(values) - values) * delta).flatten(1).sum(1)
        assert torch.allclose(found[:, column], expected, atol=1e-5)
    smallest = (float(site.step), 254 * float(site.log2_base))
    site.settle(torch.tensor(4.0))
    assert (float(site.step), 14 * float(site.log2_base)) == pytest.approx(smallest)
    lq.calibrate(model, [x])
    assert torch.equal(site(values), quantized_mlp(bits=4)[2](values))


@pytest.mark.parametrize("size", [(3, 7), (2, 300, 700)])
def test_gradients_with_a_shift_and_values_that_stay(size):
    """Against the formula element by element, and against those that transforms of torch.func see."""
    torch.manual_seed(0)
    grid = LogGrid(*map(torch.tensor, (1.1, 0.4, 0.17, -0.1)))
    quantizer = LogQuantizer(replace(SPEC, levels="log"))
    with torch.no_grad():
        for part, value in zip(("log2_step", "log2_base", "log_shift", "log_rest"), grid, strict=True):
            getattr(quantizer, part).copy_(value.log2() if part == "log2_step" else value)
    quantizer.refresh()
    x, log2_step = torch.randn(size, requires_grad=True), quantizer.log2_step.clone().requires_grad_()
    kept, weights = (torch.rand(size) < 0.3).float(), torch.randn(size)
    (quantizer.rounded_by(x, log2_step, kept=kept, gradient_scale=0.5) * weights).sum().backward()
    free = (kept == 1) | (x + 0.17 < 1.1)
    assert torch.equal(x.grad, weights.where(free, 0.0))
    error = ((grid.rounded(x.detach(), 4.0) - x.detach()) / 1.1).where(free, 1.0).where(kept == 0, 0.0)
    assert float(log2_step.grad) == pytest.approx(float((error * weights).sum()) * 1.1 * math.log(2) * 0.5, rel=2e-3)

    def loss(values, step):
        return (quantizer.rounded_by(values, step, kept=kept, gradient_scale=0.5) * weights).sum()

    to_x, to_step = torch.func.grad(loss, (0, 1))(x.detach(), log2_step.detach())
    assert torch.allclose(to_x, x.grad)
    assert float(to_step) == pytest.approx(float(log2_step.grad), rel=2e-3)


@pytest.mark.parametrize("levels", ["log2", "log"])
def test_no_bits_give_zeros(levels):
    quantizer = LogQuantizer(replace(SPEC, bits=0, levels=levels))
    quantizer._set_range(Samples(torch.randn(1, 100)), True, weights=False)
    assert not quantizer(torch.randn(5)).any()
    wide = LogQuantizer(replace(SPEC, levels=levels))
    wide._set_range(Samples(torch.randn(1, 100)), True, weights=False)
    wide.settle(torch.tensor(0.0))
    assert not wide(torch.randn(5)).any()


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
    assert [site.name for site in loaded.sites if site.gelu] == ["mlp.2.input"]


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
        with pytest.raises(lq.SpecError, match="has logarithmic levels, which the estimator"):
            lq.set_estimator(model, name)
    lq.set_estimator(model, "stableqat")  # of weights alone
    assert site.estimator == lq.quantizer.estimators.LSQ()


@pytest.mark.parametrize("options", [{}, {"probabilities": "uniform", "gelu": "log"}])
def test_reconstruction_learns_the_largest_level(options):
    model, x = quantized(**options)
    (site,) = probabilities(model)
    before = float(site.log2_step)
    lq.reconstruct(model, [x], units="network", iterations=30, batch_size=8, activation_mode="learned", step_lr=1e-2)
    assert float(site.log2_step) != before


@pytest.mark.parametrize("options", [{}, {"gelu": "log"}, {"probabilities": "log"}])
def test_onnx_gives_the_same(tmp_path, options):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = quantized(**options)
    lq.export_onnx(model, x[:2], tmp_path / "model.onnx")
    settings = runtime.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float inputs stay so
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
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
        (lambda: lq.QuantSpec(4, levels="log3"), "levels='log3' is unknown; use one of"),
        (lambda: lq.QuantSpec(4, levels="log2"), "levels='log2' is for activations, which are quantized per tensor"),
        (lambda: lq.QuantSpec(4, per_channel=False, levels="log", power_of_two=True), "levels='log' has no power_of"),
        (lambda: lq.attach(nn.Linear(2, 2), 4, probabilities="log3"), "probabilities='log3' is unknown"),
        (lambda: lq.attach(nn.Linear(2, 2), 4, gelu="log2"), "gelu='log2' is unknown; use one of"),
    ],
)
def test_what_does_not_exist(make, message):
    with pytest.raises(lq.SpecError, match=message):
        make()


@pytest.mark.parametrize("options", [{"probabilities": "log2"}, {"gelu": "log"}])
def test_they_need_a_structure(options):
    with pytest.raises(lq.StateError, match="=.log2?. needs to know how the tensors flow"):
        lq.attach(nn.Sequential(nn.Linear(2, 2)), 4, 4, **options)
