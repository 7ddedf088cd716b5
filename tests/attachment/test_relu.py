"""ReLUs in the place of GELUs: what state dicts, checkpoints and packed files say of them."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.relu import MARK, ReLUForGELU, marked, put_relu, put_relus_of, relus_in
from lq.errors import DataError
from tests.reconstruction.networks import Tokens, samples


def model_of(relus=True, seed=0):
    torch.manual_seed(seed)
    model = Tokens().eval()
    for i in (0, 1) if relus else ():
        put_relu(model, f"blocks.{i}.mlp.1")
    return model


def test_one_takes_the_place_with_its_mode_and_hooks():
    model, seen = Tokens().eval(), []
    gelu = model.blocks[0].mlp[1]
    gelu.register_forward_hook(lambda *_: seen.append(1))
    put_relu(model, "blocks.0.mlp.1")
    relu = model.blocks[0].mlp[1]
    assert isinstance(relu, ReLUForGELU) and not relu.training and relus_in(model) == ["blocks.0.mlp.1"]
    x = torch.tensor([-1.0, 2.0])
    assert relu(x).tolist() == [0.0, 2.0] and seen == [1]
    assert marked(model.state_dict()) == ["blocks.0.mlp.1"]


def test_a_plain_model_refuses_the_state_dict():
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*blocks.0.mlp.1.{MARK}"):
        model_of(relus=False).load_state_dict(model_of().state_dict())


def test_the_state_dict_of_a_plain_model_is_refused():
    message = "the checkpoint has a GELU at 'blocks.0.mlp.1', where the model has a ReLU since ReconstructMLP: build"
    with pytest.raises(RuntimeError, match=message):
        model_of().load_state_dict(model_of(relus=False).state_dict())
    with pytest.raises(DataError, match=message):
        put_relus_of(model_of(), model_of(relus=False).state_dict())


def test_they_are_put_where_a_state_dict_has_them():
    saved, model = model_of().state_dict(), model_of(relus=False, seed=1)
    put_relus_of(model, {f"net.{key}": value for key, value in saved.items()}, "net.")
    model.load_state_dict(saved)
    x = samples((3, 8, 8), 2)
    with torch.no_grad():
        assert torch.equal(model(x), model_of()(x))


@pytest.mark.parametrize("name", ["blocks.0.mlp.0", "blocks.7.act", "blocks"])
def test_a_model_without_such_an_activation_function(name):
    model = model_of(relus=False)
    message = f"the checkpoint has a ReLU in place of a GELU at '{name}', where Tokens has no activation function"
    with pytest.raises(DataError, match=message):
        put_relus_of(model, {f"{name}.{MARK}": torch.ones(())})
    assert relus_in(model) == []


@pytest.mark.parametrize("kind", ["checkpoint", "packed"])
def test_quantized_files_load_again(kind, tmp_path):
    x = samples((3, 8, 8), 8)
    model = model_of()
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x])
    path = tmp_path / ("model.safetensors" if kind == "packed" else "model.pt")
    if kind == "packed":
        lq.save(model, path)
    else:
        torch.save(model.state_dict(), path)
    loaded = lq.load(path, model_of(relus=False, seed=1))
    assert relus_in(loaded) == ["blocks.0.mlp.1", "blocks.1.mlp.1"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), model.eval()(x))
    plain = model_of(relus=False)
    lq.calibrate(lq.attach(plain, 4, 8, structure=lq.inspect(plain, x)), [x])
    with pytest.raises(DataError, match="the checkpoint has a GELU at 'blocks.0.mlp.1'"):
        lq.load(plain.state_dict(), model_of())


def test_onnx_has_relus(tmp_path):
    pytest.importorskip("onnx")
    import onnx

    x = samples((3, 8, 8), 2)
    model = model_of()
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    lq.export_onnx(model, x, tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Relu") == 2 and "Erf" not in kinds and "Gelu" not in kinds


def test_it_is_a_module_like_others():
    model = nn.Sequential(nn.Linear(4, 4), ReLUForGELU()).half()
    assert model.state_dict()[f"1.{MARK}"].dtype == torch.uint8
    model.load_state_dict(model.state_dict())
    model.load_state_dict({"0.weight": model[0].weight}, strict=False)
