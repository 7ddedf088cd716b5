"""Biases in ONNX files, and the BatchNorms that go into them: multiples of products of steps, in file and model."""

import numpy as np
import pytest
import torch
from torch import nn

from lq.export import export_onnx
from tests.attachment.networks import images
from tests.attachment.test_folding import norms
from tests.export.exported import assert_close, biases, calibrated, constants, kinds, multiplied, nodes, relative, types
from tests.export.nets import OF_TORCH, few

pytestmark = OF_TORCH


@pytest.mark.parametrize("name", ["convolutions", "8 bits", "2 bits", "depthwise", "resnet", "vit", "upwards"])
def test_biases_of_file_and_model_are_the_same_multiples_of_products_of_steps(name, files):
    file = files(name)
    found = list(biases(file.path))
    assert found
    parameters = dict(file.model.named_parameters())
    for bias, values, products, _ in found:
        assert_close(values, parameters[bias], 1e-7)
        whole = values / products
        assert np.abs(whole - whole.round()).max() < 1e-2 + 1e-6 * np.abs(whole).max()
        assert not torch.equal(parameters[bias].detach(), file.before[bias])
        moved = (parameters[bias].detach() - file.before[bias]).abs().numpy()
        assert (moved <= 0.51 * products + 1e-7 * np.abs(values)).all()
    assert any(note.startswith(f"{len(found)} biases were rounded") for note in file.report.notes)
    changed = {k for k, v in file.model.state_dict().items() if not torch.equal(v, file.before[k])}
    assert changed == {name for name, *_ in found}


def test_biases_of_matrix_products_are_integers(files):
    """With a float bias onnxruntime computes a Gemm in float."""
    path = files("8 bits").path
    gemms = [node for name, _, _, node in biases(path) if node.op_type == "Gemm"]
    assert len(gemms) == 2
    made = {node.output[0]: node for node in nodes(path)}
    for node in gemms:
        source = made[node.input[2]]
        assert source.op_type == "DequantizeLinear"
        assert constants(path)[source.input[0]].dtype == np.int32


def test_biases_of_layers_on_floats_stay(files):
    file = files("convolutions")
    assert torch.equal(file.model[0].bias.detach(), file.before["0.bias"])
    assert np.array_equal(constants(file.path)["0.bias"], file.before["0.bias"].numpy())


def test_batchnorms_that_are_left_go_into_steps_and_biases(files):
    """The integers stay those of the model; its norms' biases are what the file says."""
    file = files("batchnorms")
    assert kinds(file.path)["BatchNormalization"] == 0 and norms(file.model) == ["1", "4"]
    assert set(types(file.path).values()) == {"INT4"}
    assert not torch.equal(file.model[4].bias.detach(), file.before["4.bias"])
    assert torch.equal(file.model[1].bias.detach(), file.before["1.bias"])  # behind a layer on floats
    found = [(values, products) for _, values, products, node in biases(file.path) if node.op_type == "Conv"]
    assert len(found) == 1
    values, products = found[0]
    norm = file.model[4]
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert_close(values, (file.model[3].bias.double() - norm.running_mean.double()) * gain + norm.bias.double())
    whole = values / products
    assert np.abs(whole - whole.round()).max() < 1e-2 + 1e-6 * np.abs(whole).max()
    value = multiplied(file.path, "3")[0][0]
    np.testing.assert_allclose(value, (file.model[3].weight.double() * gain.view(-1, 1, 1, 1)).detach(), rtol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorms_of_equal_biases(affine, tmp_path):
    """Zeros, as they begin with, or stay."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    model.train()(images(8))
    calibrated(model, images(8), **few(4), first_last=None)
    assert relative(export_onnx(model, images(8), tmp_path / "m.onnx")) < 1e-3
