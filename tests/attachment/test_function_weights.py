"""Weights that functions use, as those of attention and recurrent layers: their widths, ranges and baking."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.running import CallQuantizers
from lq.attachment.sites import is_attached, quantizers
from lq.quantizer.weight_quantizer import WeightQuantizer
from tests.models import example


def test_of_a_first_recurrent_module_only_weights_of_the_input_are_wide():
    """Those that multiply its states, or what its first layer gives, are no first layer's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(4, 6, num_layers=2, batch_first=True)), torch.randn(2, 3, 4)
    model.append(nn.Linear(6, 5)).append(nn.Linear(5, 3))
    model.forward = lambda x: model[2](model[1](model[0](x)[0]))
    lq.attach(model, 3, structure=lq.inspect(model, x))
    widths = {name.rpartition("_")[2]: int(q.bits[0]) for name, q in of_functions(model).items()}
    assert widths == {"0": 8, "1": 3, "4": 3, "5": 3}


def of_functions(model):
    """Quantizers of weights that functions use, by name."""
    at_calls = [q for m in model.modules() if isinstance(m, CallQuantizers) for q in m._modules.values()]
    return {q.name: q for q in at_calls if isinstance(q, WeightQuantizer)}


@pytest.mark.parametrize("kind", ["text", "encoder", "odd weights"])
@pytest.mark.parametrize("widths", [3, 0, "by channel"])
def test_set_bits_finds_the_ranges_of_weights_of_functions(kind, widths):
    """The ranges that the calls find of what they get."""
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x), first_last=None), [x])
    found = of_functions(model)
    wanted = {
        n: [2 + i % 3 for i in range(q.bits.numel())] if widths == "by channel" else widths for n, q in found.items()
    }
    lq.set_bits(model, wanted)
    assert found and all(q.calibrated for q in quantizers(model))
    known = {name: q.log2_step.clone() for name, q in found.items() if q.source is not None}
    assert known
    for name in known:
        found[name].forget_range()
    model.eval()(x)
    for name, quantizer in found.items():
        assert torch.equal(quantizer.bits, torch.tensor(wanted[name]).float().expand_as(quantizer.bits))
        assert name not in known or torch.equal(quantizer.log2_step, known[name])


def test_set_bits_of_a_weight_that_is_computed_first():
    """It keeps its range until the next call finds the one of the new width."""
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 8, structure=lq.inspect(model, x), first_last=None), [x])
    quantizer = of_functions(model)["conv.conv2d_0_weight"]
    lq.set_bits(model, {"conv.conv2d_0": 2})
    kept = quantizer.step.clone()
    model.eval()(x)
    found = quantizer.step.clone()
    assert quantizer.calibrated and not torch.equal(found, kept)
    quantizer.forget_range()
    model(x)
    assert torch.equal(quantizer.step, found)


def test_a_model_with_other_widths_of_functions_is_reconstructed_and_saved(tmp_path):
    model, x = example("encoder")
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x])
    lq.set_bits(model, dict.fromkeys(of_functions(model), 3))
    lq.reconstruct(model, [x], iterations=2)
    lq.save(model, tmp_path / "m.safetensors")
    assert torch.equal(lq.load(tmp_path / "m.safetensors", example("encoder")[0])(x), model.eval()(x))


def test_float_checkpoints_give_weights_of_functions_their_ranges():
    model, x = example("encoder")
    lq.calibrate(lq.attach(model, 4, structure=lq.inspect(model, x)), [x])
    other = {key: 3 * value for key, value in example("encoder")[0].state_dict().items()}
    before = {name: q.step.clone() for name, q in of_functions(model).items()}
    model.load_state_dict(other)
    assert before
    for name, step in before.items():
        torch.testing.assert_close(of_functions(model)[name].step, 3 * step)


@pytest.mark.parametrize("kind", ["text", "encoder", "odd weights"])
def test_baked_weights_of_functions(kind):
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 3, 6, structure=lq.inspect(model, x), first_last=None), [x])
    expected, names = model.eval()(x), set(of_functions(model))
    stay = {"conv.conv2d_0_weight", "conv2d_0_weight"} & names  # one is computed, one a buffer
    lq.detach(model, bake=True)
    assert torch.equal(model(x), expected)
    assert set(of_functions(model)) == stay and len(stay) < len(names)
    lq.detach(model)
    assert not is_attached(model) and not any("forward" in vars(m) for m in model.modules())
    for name, parameter in model.named_parameters():
        if name.endswith(("in_proj_weight", "mix")) or "weight_hh" in name:
            rows = parameter.t() if name == "mix" else parameter
            assert max(len(row.unique()) for row in rows.detach()) <= 8
