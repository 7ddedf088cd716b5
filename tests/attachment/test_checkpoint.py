"""Checkpoints: float and quantized ones, into float and quantized models."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.checkpoint import read_state_dict
from lq.attachment.sites import weight_quantizer
from lq.errors import DataError
from tests.attachment.networks import images, quantized, small
from tests.attachment.test_folding import convnet, randomize
from tests.export.files import state
from tests.helpers import assert_same


def saved():
    """A quantized model with a width for each channel of a layer."""
    model = quantized()
    lq.set_bits(model, {"2": [0, 1, 2, 8], "5": 2})
    return model


def save(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "model.pt")
    return tmp_path / "model.pt"


SOURCES = {
    "state dict": lambda state, path: state,
    "checkpoint": lambda state, path: {"state_dict": state, "epoch": 3},
    "file": save,
    "name of a file": lambda state, path: str(save(state, path)),
    "checkpoint file": lambda state, path: save({"state_dict": state, "epoch": 3}, path),
}


@pytest.mark.parametrize("source", SOURCES)
def test_load_into_a_float_model(source, tmp_path):
    model = saved()
    fresh = small(seed=9).eval()
    assert lq.load(SOURCES[source](model.state_dict(), tmp_path), fresh) is fresh
    assert torch.equal(fresh(images()), model(images()))
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert weight_quantizer(fresh[2]).bits.tolist() == [0, 1, 2, 8]
    assert torch.equal(lq.detach(fresh)(images()), small().eval()(images()))


@pytest.mark.parametrize("options", [{}, {"weights": 8, "activations": 3}, {"exclude": "5", "first_last": None}])
def test_load_into_a_model_quantized_otherwise(options):
    model = quantized()
    other = quantized(**options)
    lq.load(model.state_dict(), other)
    if "exclude" in options:
        assert weight_quantizer(other[5]) is not None
    assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize(
    "spec",
    [
        lq.QuantSpec(3, per_channel=False),
        lq.QuantSpec(3, symmetric=False),
        lq.QuantSpec(1),
        lq.QuantSpec(4, power_of_two=True),
    ],
)
def test_every_kind_of_grid_comes_back(spec):
    model = quantized(weights=spec, first_last=None)
    fresh = lq.load(model.state_dict(), small(seed=9).eval())
    assert torch.equal(fresh(images()), model(images()))


def test_activations_alone_come_back():
    model = quantized(weights=None)
    fresh = lq.load(model.state_dict(), small(seed=9).eval())
    assert weight_quantizer(fresh[2]) is None
    assert torch.equal(fresh(images()), model(images()))


def test_quantized_into_quantized():
    model, other = quantized(), lq.attach(small(seed=9), 4, 8).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


def test_a_loaded_model_calibrates_and_learns():
    fresh = lq.load(saved().state_dict(), small(seed=9))
    lq.calibrate(fresh, [images(16, 2)])
    lq.set_estimator(fresh, "lsq")
    fresh.train()(images()).square().sum().backward()
    assert all(p.grad is not None for name, p in fresh.named_parameters() if name.endswith("log2_step"))
    assert weight_quantizer(fresh[2]).bits.tolist() == [0, 1, 2, 8]
    assert fresh[2].weight[0].abs().max() == 0


def test_float_into_quantized_finds_the_ranges_of_the_loaded_weights():
    model = lq.attach(small(), 4).eval()
    expected = lq.attach(small(seed=9), 4).eval()
    model.load_state_dict(small(seed=9).state_dict())
    assert torch.equal(model(images()), expected(images()))
    assert torch.equal(lq.detach(model)(images()), small(seed=9)(images()))


def test_float_into_a_calibrated_model_keeps_the_ranges_of_activations():
    model = quantized()
    before = model[6].input_quantizer.step.item()
    with pytest.warns(UserWarning, match="without activation ranges was loaded into a calibrated model"):
        model.load_state_dict(small(seed=9).state_dict())
    assert model[6].input_quantizer.step.item() == before
    assert torch.equal(lq.detach(model)(images()), small(seed=9)(images()))


def test_loading_leaves_the_given_state_dict_alone():
    state = small(seed=9).state_dict()
    keys, copies = list(state), copy.deepcopy(state)
    lq.attach(small(), 4).load_state_dict(state)
    assert list(state) == keys
    assert all(torch.equal(state[key], copies[key]) for key in keys)


def test_other_shapes_are_torchs_error():
    state = small().state_dict()
    state["5.weight"] = torch.ones(8, 17)
    with pytest.raises(RuntimeError, match="size mismatch for 5.parametrizations.weight.original"):
        lq.attach(small(), 4).load_state_dict(state)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"net": m})])
def test_a_folded_checkpoint_folds_the_model_it_is_loaded_into(wrap):
    model = wrap(convnet()).eval()
    lq.fold_batchnorm(model)
    lq.attach(model, 4)
    fresh = wrap(randomize(convnet(), 5)).eval()
    lq.load(model.state_dict(), fresh)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fresh.modules())
    x = images(2)
    net = [m["net"] if isinstance(m, nn.ModuleDict) else m for m in (fresh, model)]
    assert torch.equal(net[0](x), net[1](x))


def test_a_checkpoint_that_was_not_folded_keeps_its_norms():
    model = lq.attach(convnet().eval(), 4)
    fresh = lq.load(model.state_dict(), randomize(convnet(), 5).eval())
    assert any(isinstance(m, nn.BatchNorm2d) for m in fresh.modules())
    assert torch.equal(fresh(images(2)), model(images(2)))


def test_an_unfolded_float_checkpoint_into_a_folded_and_quantized_model():
    model = convnet().eval()
    lq.fold_batchnorm(model)
    lq.attach(model, 4)
    other = randomize(convnet(), 5).eval()
    model.load_state_dict(other.state_dict())
    lq.fold_batchnorm(other)
    lq.attach(other, 4)
    assert torch.equal(model(images(2)), other(images(2)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: small().state_dict(), "has no quantizers: it is a float one; use model.load_state_dict"),
        (lambda: {"state_dict": [1]}, "expected a state dict or a checkpoint with one, got a list"),
        (
            lambda: {**quantized().state_dict(), "9.input_quantizer.bits": torch.tensor(8.0)},
            "the checkpoint quantizes a layer '9' that Sequential does not have; build the model",
        ),
    ],
)
def test_errors(source, message):
    model = small()
    keys = list(model.state_dict())
    with pytest.raises(DataError, match=message):
        lq.load(source(), model)
    assert list(model.state_dict()) == keys


# --- parts of a checkpoint --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module that holds networks, as a LightningModule does."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_the_part_that_fits_is_taken(tmp_path):
    """As Lightning's checkpoint of a module that holds the network, a loss with weights and other things."""
    model, fresh = saved(), small(seed=9).eval()
    holder = Holder(criterion=nn.CrossEntropyLoss(torch.ones(3)), net=model, head=nn.Linear(3, 3))
    content = {"state_dict": holder.state_dict(), "hyper_parameters": {"lr": 0.1}, "epoch": 3}
    lq.load(save(content, tmp_path), fresh)
    assert torch.equal(fresh(images()), model(images()))
    assert_same(state(fresh), state(model))
    again = lq.load(save(content, tmp_path), small(seed=9).eval(), part="net")
    assert torch.equal(again(images()), model(images()))
    whole = lq.load(content, Holder(criterion=nn.CrossEntropyLoss(torch.ones(3)), net=small(9), head=nn.Linear(3, 3)))
    assert torch.equal(whole.net.eval()(images()), model(images()))


def test_a_part_that_is_folded_and_deep():
    model = convnet().eval()
    lq.fold_batchnorm(model)
    lq.attach(model, 4)
    holder = Holder(inner=Holder(_orig_mod=model), other=nn.Linear(2, 2))
    fresh = lq.load(holder.state_dict(), randomize(convnet(), 5).eval())
    assert torch.equal(fresh(images(2)), model(images(2)))


def test_several_parts_that_fit():
    holder, model = Holder(student=saved(), teacher=quantized()), small(9)
    before = state(model)
    with pytest.raises(
        DataError, match="several parts .* fit Sequential: 'student' and 'teacher'; choose one by part="
    ):
        lq.load(holder.state_dict(), model)
    assert_same(state(model), before)
    assert torch.equal(lq.load(holder.state_dict(), model.eval(), part="student")(images()), saved()(images()))


def test_of_several_parts_one_may_fit():
    holder = Holder(a=saved(), b=lq.attach(nn.Sequential(nn.Conv2d(1, 5, 3)), 4))
    assert torch.equal(lq.load(holder.state_dict(), small(9).eval())(images()), saved()(images()))


def test_parts_that_do_not_fit():
    holder, model = Holder(net=saved()), small(9)[:5]
    before = state(model)
    with pytest.raises(
        DataError, match="the part 'net' of the checkpoint is not of this Sequential: the model has no 5"
    ):
        lq.load(holder.state_dict(), model)
    with pytest.raises(DataError, match="the checkpoint has no part 'nett'; it has net"):
        lq.load(holder.state_dict(), model, part="nett")
    with pytest.raises(DataError, match="is not of this Linear: it has no bias, weight; the model has no net.0.bias"):
        lq.load(holder.state_dict(), nn.Linear(3, 3))
    assert_same(state(model), before)


def test_packed_files_have_no_parts(tmp_path):
    lq.save(saved(), tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="part='net': .* is a packed file, which holds one model as a whole"):
        lq.load(tmp_path / "m.safetensors", small(9), part="net")


# --- a model that a checkpoint does not fit is not touched ------------------------------------------------------------

BITS = "2.parametrizations.weight.0.bits"
UNFIT = {
    "another shape": ({"5.bias": torch.ones(5)}, r"5.bias is \(5,\) there and \(8,\) here"),
    "text": ({"5.bias": "x"}, "5.bias is a str there"),
    "complex": ({"5.bias": torch.ones(8, dtype=torch.complex64)}, "5.bias is complex there and floats here"),
    "integers": ({"5.bias": torch.ones(8, dtype=torch.int64)}, "5.bias is integers there and floats here"),
    "sparse": ({"5.bias": torch.ones(8).to_sparse()}, "5.bias is a tensor without plain values there"),
    "widths that are text": ({BITS: "4"}, "should have log2_step, zero_point, bits of one shape"),
    "widths that are none": ({BITS: torch.full((4,), 17.0)}, f"{BITS} should be one width for each channel, from 0 to"),
    "widths that are nan": ({BITS: torch.full((4,), torch.nan)}, f"{BITS} should be one width for each channel"),
    "widths that are integers": ({BITS: torch.full((4,), 4)}, "should have floats, it has integers"),
    "steps that are infinite": (
        {"5.input_quantizer.log2_step": torch.tensor(torch.inf)},
        "'5.input_quantizer' in the checkpoint has steps or zero points that are no finite numbers",
    ),
    "zero points that are nan": (
        {"2.parametrizations.weight.0.zero_point": torch.full((4,), torch.nan)},
        "steps or zero points that are no finite numbers",
    ),
    "half a quantizer": ({BITS: None}, "it has no 2.weight; the model has no 2.parametrizations.weight.original"),
    "an unknown layer": (
        {"9.input_quantizer.bits": torch.tensor(8.0)},
        "quantizes a layer '9' that Sequential does not",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_that_does_not_fit_is_not_touched(kind):
    change, message = UNFIT[kind]
    found = {**saved().state_dict(), **change}
    found = {key: value for key, value in found.items() if value is not None}
    for model, own in ((small(9), True), (convnet(), False), (lq.attach(small(9), 4), True)):
        before, kinds = state(model), [type(part) for part in model.modules()]
        with pytest.raises(DataError, match=message if own else "is not of this Sequential"):
            lq.load(found, model)
        assert [type(part) for part in model.modules()] == kinds
        assert_same(state(model), before)


@pytest.mark.parametrize("part", ["running_mean", "running_var", "weight", "num_batches_tracked"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_part_of_a_norm_that_is_missing(part, folded):
    found = lq.attach(randomize(convnet(), 5), 4).state_dict()
    key = next(key for key in found if key.endswith(".running_mean")).replace("running_mean", part)
    del found[key]
    model = convnet().eval()
    if folded:
        lq.fold_batchnorm(model)
    before = state(model)
    with pytest.raises(DataError, match=f"it has no {key}"):
        lq.load(found, model)
    assert_same(state(model), before)


def test_names_that_are_none():
    with pytest.raises(DataError, match="expected a state dict with names of tensors, got one with the key 3"):
        lq.load({3: torch.ones(2)}, small())


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(DataError, match="expected a state dict or a checkpoint with one, got a Tensor"):
        read_state_dict(save(torch.ones(2), tmp_path))
    with pytest.raises(DataError, match="^expected a state dict or a checkpoint with one, got a NoneType"):
        lq.load(None, small())
