"""Quantizers that calibration does not reach: float in eval mode, the range of the first values in training."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import input_quantizer, quantizers
from lq.calibration.calibration import needs_calibration
from lq.errors import NoEffectWarning, StateError
from lq.export.standard import standard_form

MINMAX = lq.QuantSpec(8, per_channel=False, symmetric=False, range="minmax")


class Auxiliary(nn.Module):
    """A head that runs in training only."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x, aux=False):
        x = self.body(x).relu()
        return self.head(x) + self.aux(x) if self.training or aux else self.head(x)


def calibrated(estimator="ste"):
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    model = lq.attach(Auxiliary(), 8, MINMAX, estimator=estimator)
    with pytest.warns(NoEffectWarning, match=r"1 of 2 activations were never seen in calibration \(aux.input\)"):
        lq.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("estimator", ["ste", "lsq", "lsq_plus"])
def test_the_first_values_in_training_give_the_range(estimator):
    model, x = calibrated(estimator)
    assert input_quantizer(model.aux).unreached
    model.train()
    model(x).sum().backward()
    found, read = input_quantizer(model.aux), torch.nn.functional.linear(x, model.body.weight, model.body.bias).relu()
    assert found.calibrated and not found.unreached
    assert found.step.item() == pytest.approx(read.max().item() / 255, rel=1e-5)
    step = found.step.clone()
    model(x * 100)
    assert torch.equal(found.step, step)


def test_in_eval_mode_values_pass_in_float_and_it_is_said_once():
    model, x = calibrated()
    expected = model.eval()(x)
    read = []
    model.aux.register_forward_hook(lambda m, args, out: read.append(args[0]))
    with pytest.warns(NoEffectWarning, match=r"aux.input is used, but calibration did not come there"):
        both = model(x, aux=True)
    assert both.shape == expected.shape
    hidden = torch.nn.functional.linear(x, model.body.weight, model.body.bias).relu()
    assert torch.equal(read[0], hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, aux=True)
    assert input_quantizer(model.aux).unreached


def test_a_model_that_was_not_calibrated_says_so():
    model = lq.attach(Auxiliary(), 8, 8)
    for mode in (True, False):
        with pytest.raises(StateError, match=r"head.input has no range yet: run lq.calibrate"):
            model.train(mode)(torch.randn(2, 4))


def test_checkpoints_and_copies_know_it(tmp_path):
    model, x = calibrated()
    assert not needs_calibration(model)
    again = lq.load(model.state_dict(), Auxiliary())
    lq.save(model, tmp_path / "packed.safetensors")
    packed = lq.load(tmp_path / "packed.safetensors", Auxiliary())
    for other in (again, packed, copy.deepcopy(model)):
        assert input_quantizer(other.aux).unreached
        assert not needs_calibration(other)
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_average_of_ranges_that_are_none():
    """Averages over -inf are NaN: that must not raise in the middle of an epoch."""
    model, x = calibrated()
    with torch.no_grad():
        input_quantizer(model.aux).log2_step.fill_(torch.nan)
    input_quantizer(model.aux).refresh()
    assert input_quantizer(model.aux).unreached
    model.train()(x)


def test_summary_exports_and_searches_leave_it_out():
    model, x = calibrated()
    assert {layer.name: layer.input_bits for layer in lq.summary(model).layers}["aux"] is None
    with pytest.warns(NoEffectWarning, match="never used"):
        table = lq.measure_sensitivity(model, [x], "output_distortion")
    assert "aux.input" not in {tensor.name for tensor in table.tensors}
    torch.testing.assert_close(standard_form(model)(x), model.eval()(x))
    lq.optimize_ranges(model, [x], evaluations=3)
    assert input_quantizer(model.aux).unreached


def test_calibration_that_comes_there_gives_the_range():
    model, x = calibrated()
    lq.calibrate(model, [x], forward=lambda m, batch: m(batch, aux=True))
    assert all(quantizer.calibrated for quantizer in quantizers(model))


def test_several_processes_stay_alike(tmp_path):
    """Each would find a range of its own: values pass in float, and what is learned stays in the graph."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, x = calibrated("lsq")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            model.train()
            with pytest.warns(NoEffectWarning, match="train on one process"):
                loss = model(x).sum()
        assert loss.isfinite()
        loss.backward()
        assert input_quantizer(model.aux).unreached
        assert input_quantizer(model.aux).log2_step.grad == 0
    finally:
        torch.distributed.destroy_process_group()
