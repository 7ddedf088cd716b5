"""Checkpoints of prepared models, and of models as they were before, into each other."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.preparation.stored import PLAN, VALUES, match, rescalings
from tests.attachment.preparation.nets import Block, Sequence, uneven


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return uneven(Sequence(embed=nn.Linear(6, 16), block=Block(), norm=nn.LayerNorm(16), head=nn.Linear(16, 3)), seed)


@pytest.fixture
def x():
    return torch.randn(32, 5, 6, generator=torch.Generator().manual_seed(1))


def prepared(x, seed=0):
    model = build(seed)
    lq.prepare(model, [x], equalize="activations")
    return model


def same(one, other, x):
    with torch.no_grad():
        return bool((one(x) - other(x)).norm() < 1e-5 * other(x).norm())


def test_a_checkpoint_of_the_model_before_is_rescaled(x):
    model, other = prepared(x), build(seed=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    model.load_state_dict(other.state_dict())
    assert same(model, other, x)
    assert not torch.equal(model.norm.weight, other.norm.weight)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in before.items())  # the caller's own


def test_a_checkpoint_of_a_prepared_model_is_taken_as_it_is(x):
    first, second = prepared(x), prepared(2 * x + 1, seed=5)
    second.load_state_dict(first.state_dict())
    assert same(second, first, x)
    assert torch.equal(second.norm.weight, first.norm.weight)
    second.load_state_dict(build().state_dict())  # by the first one's r and t
    assert torch.allclose(second.norm.weight, first.norm.weight)


def test_copies_know_too(x):
    model = prepared(x)
    copied, other = copy.deepcopy(model), build(seed=5)
    copied.load_state_dict(other.state_dict())
    assert same(copied, other, x)
    assert same(model, build(), x)


def test_preparing_twice_adds_up(x):
    model = prepared(x)
    lq.prepare(model, [x + 3], power=0.5)
    assert same(model, build(), x)
    model.load_state_dict(build(seed=5).state_dict())
    assert same(model, build(seed=5), x)


def test_folded_norms_before(x):
    def conv():
        torch.manual_seed(3)
        parts = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)]
        model = nn.Sequential(*parts)
        for norm in (model[1], model[4]):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
        return model.eval()

    model, images = conv(), torch.randn(4, 3, 8, 8)
    lq.fold_batchnorm(model)
    assert len(lq.prepare(model, [images], equalize="weights").pairs) == 1
    model.load_state_dict(conv().state_dict())
    assert same(model, conv(), images)


def test_quantized_checkpoints(x, tmp_path):
    model = prepared(x)
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x])
    assert lq.save(model, tmp_path / "model.safetensors") > 0
    for source in (model.state_dict(), tmp_path / "model.safetensors"):
        for start in (build(), prepared(x + 1, seed=5)):
            assert same(lq.load(source, start), model, x)
    loaded = lq.load(model.state_dict(), build())
    with pytest.warns(UserWarning, match="a checkpoint without activation ranges was loaded into a calibrated model"):
        loaded.load_state_dict(build(seed=5).state_dict())
    lq.detach(loaded)
    assert same(loaded, build(seed=5), x)


def test_packed_files_do_not_have_the_values(x, tmp_path):
    model = prepared(x)
    lq.calibrate(lq.attach(model, 4, 8), [x])
    lq.save(model, tmp_path / "model.safetensors")
    loaded = lq.load(tmp_path / "model.safetensors", build())
    assert f"{PLAN}" in loaded.state_dict()
    assert f"{VALUES}" not in loaded.state_dict()
    with pytest.raises(lq.StateError, match="this one was loaded from a packed file, which does not say by how much"):
        loaded.load_state_dict(build().state_dict(), strict=False)


def test_a_quantized_checkpoint_of_the_model_before(x):
    plain, model = build(), prepared(x)
    lq.calibrate(lq.attach(plain, 4, 8), [x])
    with pytest.raises(lq.StateError, match="has quantizers of a model that was not prepared, and this one is"):
        model.load_state_dict(plain.state_dict(), strict=False)
    assert same(lq.load(plain.state_dict(), model), plain, x)
    assert not rescalings(model)
    assert model.block.kv.bias is None
    assert list(model.state_dict()) == list(plain.state_dict())


def test_half_a_checkpoint(x):
    model = prepared(x)
    part = {key: value for key, value in build().state_dict().items() if not key.startswith("head")}
    with pytest.raises(lq.StateError, match=r"has no head.weight, which lq.prepare has rescaled together with norm"):
        model.load_state_dict(part, strict=False)
    others = {key: value for key, value in build().state_dict().items() if key.startswith("embed")}
    model.load_state_dict(others, strict=False)
    assert same(model, build(), x)


def test_other_pairs(x):
    model, norms = prepared(x), build()
    lq.prepare(norms, [x])
    with pytest.raises(lq.StateError, match="is of a model that was prepared at other layers; load it with lq.load"):
        model.load_state_dict(norms.state_dict())
    match(model, norms.state_dict())
    model.load_state_dict(norms.state_dict())
    assert same(model, build(), x)
    model.load_state_dict(build(seed=5).state_dict())
    assert same(model, build(seed=5), x)


def test_a_float_checkpoint_of_a_prepared_model(x):
    model, start = prepared(x), build(seed=5)
    with pytest.raises(RuntimeError, match=f"Unexpected.*{PLAN}"):
        start.load_state_dict(model.state_dict())
    match(start, model.state_dict())
    start.load_state_dict(model.state_dict())
    assert same(start, model, x)
    start.load_state_dict(build(seed=5).state_dict())
    assert same(start, build(seed=5), x)


def test_damaged_entries(x):
    state = prepared(x).state_dict()
    with pytest.raises(lq.DataError, match=f"{PLAN} in the checkpoint is damaged: it should be what lq.prepare has"):
        match(build(), {**state, PLAN: torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(lq.DataError, match="in the checkpoint is of a module that Linear has not"):
        match(nn.Linear(2, 2), state)


def test_reconstruction_that_goes_back(x):
    """MRECG by loss tries out and restores a state."""
    model = prepared(x)
    lq.calibrate(lq.attach(model, 4, 4, structure=lq.inspect(model, x)), [x])
    options = {"merges": 1, "iterations": 4, "search_iterations": 2, "units": "mixed", "metric": "loss"}
    assert lq.reconstruct(model, [x], **options).units
    assert rescalings(model)
