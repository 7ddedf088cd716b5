"""Modules that have no shapes or no values yet."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import FineTune, Quantize
from tests.helpers import QUIET, Tiny, assert_same, fit, loader, tiny, trainer

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:.*Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:.*uninitialized parameter"),
]


class Lazy(Tiny):
    """As `Tiny`, with shapes that the first input tells."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )


@pytest.mark.parametrize("example", [None, torch.randn(2, 1, 6, 6)], ids=["data", "example"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_lazy_layers_get_their_shapes(example, epochs):
    torch.manual_seed(0)
    module = Lazy()
    module.example_input_array = example
    fit(module, [Quantize(4, 4), FineTune()], max_epochs=epochs)
    assert type(module.net[1]) is (nn.BatchNorm2d if epochs else nn.Identity)
    assert [q.name for q in quantizers(module)] == ["net.0.weight", "net.4.weight", "net.4.input"]
    assert module.net[4].parametrizations.weight.original.shape == (3, 144)


def test_lazy_layers_that_nothing_tells_the_shapes_of():
    module = Lazy()
    module.example_input_array = torch.randn(2, 36)
    with pytest.raises(lq.DataError, match=r"Lazy has lazy layers.*net.0, net.1, net.4 .*set example_input_array"):
        fit(module, [Quantize(4, 4)])


def test_meta_device():
    with torch.device("meta"):
        module = tiny()
    with pytest.raises(lq.StateError, match=r"without values, on the meta device, such as net.0.weight.*before fit"):
        fit(module, [Quantize(4, 4)])
    module.to_empty(device="cpu").load_state_dict(tiny().state_dict())
    usual = tiny()
    for one in (module, usual):
        fit(one, [Quantize(4, 4)], max_epochs=0)
    assert_same(dict(module.state_dict()), dict(usual.state_dict()))


class Late(Tiny):
    """Takes its values in ``configure_model``."""

    def configure_model(self):
        if next(self.parameters()).is_meta:
            self.to_empty(device="cpu").load_state_dict(tiny().state_dict())


def test_meta_device_until_configure_model():
    with torch.device("meta"):
        module = Late()
    usual = tiny()
    for one in (module, usual):
        fit(one, [Quantize(4, 4)], max_epochs=0)
    assert_same(dict(module.state_dict()), dict(usual.state_dict()))


def test_the_modules_own_hook_stays():
    seen = []
    module = tiny()
    module.on_load_checkpoint = seen.append
    fit(module, [Quantize(4, 4)], max_epochs=0)
    assert vars(module)["on_load_checkpoint"] == seen.append
    assert trainer([Quantize(4, 4)]).validate(module, loader(), verbose=False)
