"""Files of something else, and packed files of another model."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lq
from lq.attachment.sites import is_attached
from lq.errors import DataError
from tests.attachment.networks import small
from tests.export.damage import NO_PACKED_FILE, QUICK
from tests.export.files import state
from tests.helpers import assert_same
from tests.models import example

# --- other files ------------------------------------------------------------------------------------------------------


def plain(path):
    save_file(small().state_dict(), path)


def plain_with_metadata(path):
    save_file(small().state_dict(), path, metadata={"format": "pt"})


class Evil:
    """What a pickle can do."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(path):
    path.write_bytes(pickle.dumps({"state_dict": Evil(path.parent / "executed")}))


def torch_pickled(path):
    torch.save({"state_dict": Evil(path.parent / "executed")}, path)


FILES = {
    "plain safetensors": (plain, NO_PACKED_FILE),
    "safetensors of transformers": (plain_with_metadata, NO_PACKED_FILE),
    "text": (lambda path: path.write_text("nothing of the kind\n" * 20), "cannot be loaded: .*save the model again"),
    "short text": (lambda path: path.write_text("no"), "cannot be loaded: .*save the model again"),
    "empty": (lambda path: path.touch(), "cannot be loaded: .*save the model again"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "cannot be loaded: .*save the model again"),
    "missing": (lambda path: None, r"there is no file .*m.safetensors"),
    "a folder": (lambda path: path.mkdir(), r"m.safetensors is a folder; give the name of a file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), r"there is no file .*m.safetensors"),
    "a pickle": (pickled, "cannot be loaded: .*save the model again"),
    "a checkpoint": (torch_pickled, "cannot be loaded: .*save the model again"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("as_text", [True, False])
def test_files_of_something_else(kind, as_text, tmp_path):
    make, message = FILES[kind]
    path = tmp_path / "m.safetensors"
    make(path)
    for model in (small(), lq.attach(small(), QUICK)):
        before, attached = state(model), is_attached(model)
        with pytest.raises(DataError, match=message):
            lq.load(str(path) if as_text else path, model)
        assert is_attached(model) is attached
        assert_same(state(model), before)
    assert not (tmp_path / "executed").exists()


def test_the_pickle_above_would_be_executed(tmp_path):
    pickled(tmp_path / "m.pickle")
    pickle.loads((tmp_path / "m.pickle").read_bytes())
    assert (tmp_path / "executed").is_dir()


# --- other models -----------------------------------------------------------------------------------------------------


def classes(count):
    model = small()
    model[6] = nn.Linear(8, count)
    return model


def without_bias():
    model = small()
    model[2] = nn.Conv2d(4, 4, 3, bias=False)
    return model


OTHERS = {
    "another architecture": (
        lambda: example("block")[0],
        "is not of this Block: it has no attn.k.bias, attn.k.weight, attn.proj.bias; "
        "the model has no 0.bias, 0.weight, 2.bias; build the model that was saved, before quantization",
    ),
    "more classes": (
        lambda: classes(5),
        r"6\.(bias|weight) is \(3,?.*\) there and \(5,?.*\) here(; 6\.(bias|weight) is \(3,?.*\) there and .*)?",
    ),
    "a layer missing": (lambda: small()[:6], "the model has no 6.bias, 6.weight;"),
    "a layer more": (
        lambda: nn.Sequential(*small(), nn.Linear(3, 3)),
        "it has no 7.bias, 7.weight;",
    ),
    "a bias missing": (without_bias, "the model has no 2.bias;"),
    "a norm more": (
        lambda: nn.Sequential(*small(), nn.BatchNorm1d(3)),
        "it has no 7.bias, 7.num_batches_tracked, 7.running_mean;",
    ),
    "a wrapped one": (lambda: nn.ModuleDict({"net": small()}), "it has no net.0.bias, .*the model has no 0.bias"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), "the model has no 0.bias, 0.weight, 2.bias;"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("attached", [False, True])
def test_files_of_another_model(kind, attached, saved, tmp_path):
    make, message = OTHERS[kind]
    model = make()
    if attached:
        if kind == "no parameters":
            return
        lq.attach(model, QUICK)
    before, found = state(model), [(name, type(part)) for name, part in model.named_modules()]
    (tmp_path / "m.safetensors").write_bytes(saved[1])
    with pytest.raises(DataError, match=message):
        lq.load(tmp_path / "m.safetensors", model)
    assert [(name, type(part)) for name, part in model.named_modules()] == found
    assert_same(state(model), before)
    assert is_attached(model) is attached


def test_a_layer_of_another_kind_whose_weight_has_the_same_shape(tmp_path):
    model = lq.attach(nn.Sequential(nn.Conv2d(4, 4, 3)), 3, first_last=None)
    lq.save(model, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="0.weight"):
        lq.load(tmp_path / "m.safetensors", nn.Sequential(nn.ConvTranspose2d(4, 4, 3)))


def test_batchnorms_of_another_model_are_not_folded(saved, tmp_path):
    """Those that the file lacks are folded only if all else fits."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *list(small())[2:-1], nn.Linear(8, 5))
    before = state(model)
    (tmp_path / "m.safetensors").write_bytes(saved[1])
    with pytest.raises(DataError, match="6.weight is"):
        lq.load(tmp_path / "m.safetensors", model)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert_same(state(model), before)
