"""Packed files into models that are quantized already, in training mode, or in a Trainer."""

import copy

import pytest
import torch

import lq
from lq.attachment.sites import float_weight, quantizers, weight_quantizer
from lq.callbacks import FineTune, Quantize
from tests.attachment.networks import images, quantized, small
from tests.export.files import QUIETLY, parse, round_trip
from tests.helpers import Tiny, assert_same, fit, steps, tiny

pytestmark = QUIETLY


# --- into what a file is loaded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"weights": 3, "activations": 4},
        {"weights": 8, "activations": 2, "first_last": None},
        {"weights": 2, "symmetric": False},
        {"weights": None, "activations": 8},
        {"weights": 4, "exclude": "5", "estimator": "lsq_plus"},
    ],
    ids=str,
)
def test_into_a_model_that_is_quantized_already(options, tmp_path):
    model = quantized(weights=3, activations=4, symmetric=False)
    other = lq.attach(small(9), **options).eval()
    if options.get("activations"):
        lq.calibrate(other, [images(16, 5)])
    round_trip(model, other, images(), tmp_path)
    assert {str(q.estimator) for q in quantizers(other)} == {"LSQPlus()" if "estimator" in options else "STE()"}


@pytest.mark.parametrize("per_channel", [True, False])
def test_into_a_model_with_steps_of_another_granularity(per_channel, tmp_path):
    model = lq.attach(small(), lq.QuantSpec(3, per_channel=per_channel)).eval()
    other = lq.attach(small(9), lq.QuantSpec(3, per_channel=not per_channel)).eval()
    round_trip(model, other, images(), tmp_path)


def test_into_a_model_in_training_mode_and_of_frozen_weights(tmp_path):
    model = quantized(weights=3, activations=4)
    lq.save(model, tmp_path / "m.safetensors")
    fresh = small(9).train().requires_grad_(False)
    lq.load(tmp_path / "m.safetensors", fresh)
    assert fresh.training and all(part.training for part in fresh.modules())
    assert not float_weight(fresh[2]).requires_grad
    assert torch.equal(fresh.eval()(images()), model(images()))


def test_names_of_files_are_strings_or_paths(tmp_path):
    model = quantized(weights=3)
    for path in (str(tmp_path / "a.safetensors"), tmp_path / "b.c.safetensors"):
        assert lq.save(model, path) > 0
        assert torch.equal(lq.load(path, small(9).eval())(images()), model(images()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.c.safetensors").read_bytes()


def test_models_in_training_mode_are_saved_alike(tmp_path):
    model = quantized(weights=3, activations=4)
    lq.save(model, tmp_path / "eval.safetensors")
    lq.set_estimator(model.train(), "lsq")
    lq.save(model, tmp_path / "train.safetensors")
    assert model.training
    assert (tmp_path / "eval.safetensors").read_bytes() == (tmp_path / "train.safetensors").read_bytes()


def test_another_tool_can_open_a_file(tmp_path):
    from safetensors.torch import load_file

    model = quantized(weights=3, activations=4)
    lq.save(model, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {key: value.dtype for key, value in found.items()} == {"index": torch.uint8, "data": torch.uint8}
    header, index, data = parse((tmp_path / "m.safetensors").read_bytes())
    assert header["__metadata__"] == {"format": "lq packed 1", "lq": lq.__version__}
    assert bytes(found["index"].tolist()) == index and bytes(found["data"].tolist()) == data


# --- Lightning --------------------------------------------------------------------------------------------------------


class Around(Tiny):
    """A module that holds its network and a copy of it, of which one is quantized."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)
        self.register_buffer("seen_samples", torch.tensor(0))


def test_a_lightning_module_around_a_quantized_model(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return Around().eval()

    module, x = build(0), torch.randn(4, 1, 6, 6)
    lq.calibrate(lq.attach(module, 3, 4, include="net"), [x])
    module.seen_samples += 12
    loaded = round_trip(module, build(1), x, tmp_path)
    assert int(loaded.seen_samples) == 12 and not any(q.name.startswith("teacher") for q in quantizers(loaded))
    assert_same(loaded.teacher.state_dict(), module.teacher.state_dict())


@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus"])
def test_training_goes_on_from_a_file(estimator, tmp_path):
    module, x = tiny(), torch.randn(4, 1, 6, 6)
    fit(module, [Quantize(3, 4, fold_bn=False, symmetric=False), FineTune(estimator)], max_steps=2)
    lq.save(module, tmp_path / "first.safetensors")
    loaded = lq.load(tmp_path / "first.safetensors", tiny(5))
    begin, weights = steps(loaded), float_weight(loaded.net[3]).detach().clone()
    fit(loaded, [FineTune(estimator)], max_steps=2, max_epochs=-1)
    assert len(loaded.seen) == 2
    assert all(bool((a != b).any()) for a, b in zip(begin, steps(loaded), strict=True))
    assert not torch.equal(weights, float_weight(loaded.net[3]))
    (second := tmp_path / "second").mkdir()
    round_trip(loaded.eval(), tiny(7).eval(), x, second)
    assert (second / "model.safetensors").read_bytes() != (tmp_path / "first.safetensors").read_bytes()


def test_a_loaded_model_trains_like_the_one_that_was_saved_but_for_the_rounding_of_its_weights(tmp_path):
    """Weights that are on their levels already: the file leaves nothing out."""
    module = tiny()
    fit(module, [Quantize(3, 4, fold_bn=False)], max_steps=1)
    lq.save(module, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", tiny(5))
    twin = lq.load(module.state_dict(), tiny(6))
    with torch.no_grad():
        for mine, theirs in zip(twin.modules(), loaded.modules(), strict=True):
            if weight_quantizer(mine) is not None:
                float_weight(mine).copy_(float_weight(theirs))
    for model in (loaded, twin):
        fit(model, [FineTune("lsq")], max_steps=2, max_epochs=-1)
    assert_same(loaded.state_dict(), twin.state_dict())
