"""Layers and quantizers that are looked up once are those that the model has."""

import torch
from torch import nn

import lq
from lq.attachment.sites import activation_quantizers, float_weight, quantizers, weight_quantizer
from lq.reconstruction.quantized_model import QuantizedModel


def model():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 3)).eval()


def attached(**options):
    return lq.attach(model(), 4, 8, first_last=None, **options)


def test_it_is_what_the_modules_have():
    net = attached(exclude="2")
    looked_up = QuantizedModel(net)
    assert looked_up.quantizers == list(quantizers(net))
    assert looked_up.activations == list(activation_quantizers(net).values())
    assert looked_up.weighted == ["0", "1.0", "1.3"]
    layers = looked_up.layers_in([net])
    assert [layer.name for layer in layers] == ["0", "1.0", "1.2", "1.3", "2"]  # a BatchNorm has a weight, too
    for layer in layers:
        assert layer.module is net.get_submodule(layer.name)
        assert layer.weight is float_weight(layer.module)
        assert layer.quantizer is weight_quantizer(layer.module)
    assert layers[-1].quantizer is None


def test_layers_of_some_modules():
    net = attached()
    assert [layer.name for layer in QuantizedModel(net).layers_in([net[2], net[1]])] == ["2", "1.0", "1.2", "1.3"]
    assert QuantizedModel(net).layers_in([net[1][1]]) == []


def test_the_network_is_around_all_quantized_layers():
    assert QuantizedModel(attached()).network == ""
    assert QuantizedModel(attached(include="1.*")).network == "1"


def test_tied_weights_are_a_layer_of_each_module():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    layers = QuantizedModel(lq.attach(net, 4, None, first_last=None)).layers_in([net])
    assert [layer.name for layer in layers] == ["0", "2"] and layers[0].weight is layers[1].weight
