"""What of a unit is learned, where several units share weights or quantizers."""

import torch
from torch import nn

import lq
from lq.attachment.shared import SharedQuantizer
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.reconstruction.quantizers import tapped
from tests.models import Block
from tests.reconstruction.fitting import Unit, unit_quantizers
from tests.reconstruction.networks import samples


def test_shared_quantizers_are_learned_once():
    torch.manual_seed(0)
    data = [samples((5, 8), 8)]
    model = Block().eval()
    lq.calibrate(lq.attach(model, 4, 4, structure=lq.inspect(model, data[0]), first_last=None), data)
    shared = [m for m in model.modules() if isinstance(m, SharedQuantizer)]
    assert shared  # queries, keys and values are made of one tensor
    found = unit_quantizers(model, [model])
    owners = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    assert found.activations == owners and found.learned == owners
    one = unit_quantizers(model, [model.attn.k])
    assert one.activations == [shared[0].owner] and one.learned == one.activations
    done = unit_quantizers(model, [model.attn.q]).settled()
    later = unit_quantizers(model, [model.attn.k], done)
    assert later.activations == [shared[0].owner] and later.learned == []


def test_tied_weights_are_settled_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    lq.attach(model, 4, None, first_last=None)
    assert len(unit_quantizers(model, [model]).weights) == 1
    done = unit_quantizers(model, [model[0]]).settled()
    assert unit_quantizers(model, [model[2]], done).weights == []


def test_taps_are_nested():
    part = Unit().model[2].input_quantizer
    one, two = (lambda x: x), (lambda x: 2 * x)
    with tapped(part, one):
        with tapped(part, two):
            assert part.tap is two
        assert part.tap is one
    assert part.tap is None
