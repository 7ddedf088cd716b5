"""Within `as_float` a quantized model has the names, classes, Parameters and order of the float one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lq
from lq.attachment.float_view import as_float
from lq.attachment.sites import quantizers


def build():
    torch.manual_seed(0)
    block = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "table": nn.Embedding(5, 4)})
    tied = nn.Linear(4, 5, bias=False)
    tied.weight = block["table"].weight
    attention = nn.MultiheadAttention(4, 2)
    return nn.ModuleList([block, tied, attention, nn.ConvTranspose1d(4, 2, 3)])


def look(model):
    """Names and identities of the parameters of layers, in order, and the classes of modules."""
    named = [(n, id(p)) for n, p in model.named_parameters() if "quantizer" not in n]
    classes = [(n, type(m)) for n, m in model.named_modules() if "quantizer" not in n]
    return named, classes


def test_names_order_identity_and_classes_are_those_of_the_float_model():
    model = build()
    before = look(model)
    lq.attach(model, 4, 4)
    quantized = look(model)
    assert quantized != before
    with as_float(model):
        assert look(model) == before
        assert isinstance(model[1].weight, nn.Parameter) and model[1].weight.is_leaf
    assert look(model) == quantized
    assert not isinstance(model[1].weight, nn.Parameter)


def test_the_model_is_itself_again_after_an_error():
    model = lq.attach(build(), 4)
    before = look(model)
    with pytest.raises(ValueError, match="within"), as_float(model):
        raise ValueError("within")
    assert look(model) == before


def test_copies_made_within_are_quantized():
    model = lq.attach(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), 2, first_last=None)
    x = torch.randn(4, 6)
    with as_float(model):
        copied, again = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.equal(copied(x), model(x)) and torch.equal(again(x), model(x))
    assert [n for n, _ in copied.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert copied[0].weight.unique().numel() <= 4 * 6
    lq.detach(copied)
    assert torch.equal(copied[0].weight, model[0].parametrizations.weight.original)
    assert copied[0].weight is not model[0].parametrizations.weight.original


def test_what_others_have_made_of_layers_stays_as_it_is():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2))
    parametrizations.weight_norm(model[1], "bias", dim=None)
    before = look(model)
    lq.attach(model, 4)
    with as_float(model):
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in before[0]]
        assert torch.equal(model[1].bias, model[1].bias)
    assert model[1].bias.shape == (4,)


def test_what_quantizers_learn_is_not_among_the_parameters_and_copies_keep_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [name for name, _ in model.named_parameters()]
    lq.calibrate(lq.attach(model, 4, 4), [torch.randn(8, 4)])
    for quantizer in quantizers(model):
        quantizer.set_estimator("lsq")
    quantized = [(name, id(p)) for name, p in model.named_parameters()]
    with as_float(model):
        assert [name for name, _ in model.named_parameters()] == before
        copied = copy.deepcopy(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == quantized
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in quantized]
    assert len(quantized) > len(before)


def test_a_pruned_weight_is_shown_as_the_parameter_that_is_trained():
    model = lq.attach(nn.Sequential(nn.Linear(4, 4)), 4)
    weight = model[0].parametrizations.weight.original
    prune.l1_unstructured(model[0].parametrizations.weight, "original", 0.5)
    with as_float(model):
        assert model[0].weight is weight
