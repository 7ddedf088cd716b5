"""Quantized weights are trained however optimizers are built; if not, that is told before the first step."""

import warnings

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import float_weight, layers
from lq.callbacks import FineTune, Quantize
from lq.callbacks.trainer.untrained import UntrainedWeights, untrained_weights
from tests.helpers import QUIET, Tiny, assert_same, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def by_class(net):
    """As in YOLOv5's training script."""
    weights = [m.weight for m in net.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    rest = [m.bias for m in net.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    return [{"params": weights, "weight_decay": 1e-4}, {"params": rest}]


def by_name(net):
    """Names of the layers' own parameters."""
    weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
    return [
        {"params": weights, "weight_decay": 1e-4},
        {"params": [p for n, p in net.named_parameters() if n.endswith("bias")]},
    ]


def by_type(net):
    """As in Karpathy's minGPT: decay by the type of the layer."""
    kinds = (nn.Conv2d, nn.Linear)
    decay = [
        p for m in net.modules() if type(m) in kinds for n, p in m.named_parameters(recurse=False) if n == "weight"
    ]
    rest = [p for _, p in net.named_parameters() if not any(p is other for other in decay)]
    return [{"params": decay, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}]


def by_attribute(net):
    return [
        {"params": [net[0].weight, net[3].weight, net[8].weight]},
        {"params": [net[0].bias, net[3].bias, net[8].bias]},
    ]


def from_state(net):
    """Names of the float state dict, as loaders of layer-wise rates use."""
    named = dict(net.named_parameters())
    return [{"params": [named[name]], "lr": 0.05} for name in ("0.weight", "0.bias", "3.weight", "3.bias", "8.weight")]


STYLES = [by_class, by_name, by_type, by_attribute, from_state]


class Grouped(Tiny):
    """Its optimizer has groups of a style."""

    def __init__(self, style):
        super().__init__()
        self.style = style

    def configure_optimizers(self):
        with torch.no_grad():
            return torch.optim.SGD(self.style(self.net), 0.05, momentum=0.9)


def grouped(style):
    torch.manual_seed(0)
    return Grouped(style)


@pytest.mark.parametrize("stages", [[], ["lsq"]], ids=["Quantize", "FineTune"])
@pytest.mark.parametrize("style", STYLES)
def test_however_groups_are_made(style, stages):
    """The groups hold the Parameters, in the order, that they hold without quantization; all weights are trained."""
    module, plain = grouped(style), grouped(style)
    begin = [weight.detach().clone() for weight in map(float_weight, dict(layers(module)).values())]
    own = {id(p): name for name, p in module.named_parameters()}
    made = fit(module, [Quantize(4, 4, fold_bn=False), *map(FineTune, stages)], max_epochs=2)
    names = {id(p): name for name, p in plain.named_parameters()}
    groups = plain.configure_optimizers().param_groups
    held = [[own[id(p)] for p in group["params"]] for group in made.optimizers[0].param_groups]
    assert held == [[names[id(p)] for p in group["params"]] for group in groups]
    for (name, layer), before in zip(layers(module), begin, strict=True):
        assert not torch.equal(float_weight(layer), before), name
    assert "configure_optimizers" not in vars(module)


def test_a_configure_optimizers_of_the_instance_comes_back():
    module = tiny()
    given = module.configure_optimizers = lambda: torch.optim.SGD(by_class(module.net), 0.05)
    fit(module, [Quantize(4, 4, fold_bn=False)])
    assert module.configure_optimizers is given


def test_fine_tuning_what_was_attached_by_hand():
    module = grouped(by_class)
    lq.attach(module, 4)
    before = float_weight(module.net[3]).detach().clone()
    fit(module, [FineTune("ste")])
    assert not torch.equal(before, float_weight(module.net[3]))


def test_an_optimizer_state_of_float_training_goes_on(tmp_path):
    """Parameters are in the same order, so that momenta find theirs."""
    module = tiny()
    made = fit(module, [], loader(), enable_checkpointing=False)
    made.save_checkpoint(tmp_path / "float.ckpt")
    momenta = {n: made.optimizers[0].state[p]["momentum_buffer"].clone() for n, p in module.named_parameters()}
    resumed = tiny(3)
    names = {id(p): name for name, p in resumed.named_parameters()}
    found = {}

    class Note(Quantize):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            state = trainer.optimizers[0].state
            found.update({names[id(p)]: s["momentum_buffer"].clone() for p, s in state.items()})

    fit(resumed, [Note(4, None, fold_bn=False)], loader(), max_epochs=2, ckpt_path=tmp_path / "float.ckpt")
    assert_same(found, momenta)


# --- what is built elsewhere ----------------------------------------------------------------------------------------


class Late(Quantize):
    """Replaces the optimizer when fitting starts, by groups of another making."""

    def __init__(self, style):
        super().__init__(4, 4, fold_bn=False)
        self.style = style

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        with torch.no_grad():
            trainer.strategy.optimizers = [torch.optim.SGD(self.style(pl_module.net), 0.05)]


@pytest.mark.parametrize("style", [by_class, by_name])
def test_groups_made_of_the_quantized_module_are_told(style):
    with pytest.warns(UserWarning, match="no optimizer holds") as told:
        fit(tiny(), [Late(style)])
    (message,) = [str(w.message) for w in told if "optimizer" in str(w.message)]
    assert message.startswith("no optimizer holds the weight of net.0, net.3, net.8, while")
    assert "configure_optimizers" in message and "requires_grad=False" in message


def test_the_advice_works():
    def advice(net):
        return [p for name, p in net.named_parameters() if name.endswith(("weight", "weight.original"))]

    module = tiny()
    before = float_weight(module.net[3]).detach().clone()
    fit(module, [Late(advice)])
    assert not torch.equal(before, float_weight(module.net[3]))


def test_computed_weights_in_an_optimizer_are_told():
    with pytest.warns(UserWarning, match=r"holds what net.0, net.3, net.8 computes from its float weight"):
        fit(tiny(), [Late(by_attribute)])


def test_it_is_told_of_what_was_attached_by_hand_too():
    module = tiny()
    lq.attach(module, 4)
    optimizer = torch.optim.SGD(by_class(module.net), 0.05)
    module.configure_optimizers = lambda: optimizer
    with pytest.warns(UserWarning, match="no optimizer holds the weight of net.0"):
        fit(module, [FineTune("ste")])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_intent_is_told_by_what_is_beside(norm, bias):
    """Weights missed where biases or norms are held are told; a head alone and frozen layers are not."""
    norms = [nn.BatchNorm1d(6)] if norm else []
    body = nn.Sequential(nn.Linear(6, 6, bias=bias), *norms, nn.ReLU(), nn.Linear(6, 6, bias=bias), *norms)
    head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
    nested = lq.attach(nn.ModuleDict({"body": body, "head": head}), 4)
    everything = list(nested.parameters())
    assert untrained_weights(nested, everything) == []
    if norm or bias:
        small = [p for p in everything if p.ndim < 2]
        assert untrained_weights(nested, small) == ["body.0", f"body.{3 if norm else 2}", "head.1"]
        assert untrained_weights(nested, list(head.parameters())) == []
    body.requires_grad_(False)
    assert untrained_weights(nested, [p for p in everything if p.ndim < 2 or p is float_weight(head[1])]) == []


def test_weights_that_only_some_layers_lack():
    """One layer in float, held: those beside it are told of, by their norms and their own biases."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.Linear(4, 2))
    lq.attach(net, 4, exclude="0")
    held = [p for n, p in net.named_parameters() if n.endswith(("weight", "bias"))]
    assert untrained_weights(net, held) == ["2", "3"]


def test_a_linear_probe_is_silent():
    module = tiny()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[8].parameters(), 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for text in QUIET:
            warnings.filterwarnings("ignore", text.split(":")[1])
        fit(module, [Quantize(4, 4, fold_bn=False), FineTune("lsq")])


def test_nothing_is_told_without_training():
    made = trainer([Late(by_class)], max_epochs=0)
    made.fit(tiny(), loader())


def test_optimizers_are_looked_at_once_for_each_training():
    module = lq.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 4)
    optimizers = [torch.optim.SGD([layer.bias for layer in module], lr=0.1)]
    looks = UntrainedWeights()
    looks.look(module, optimizers)  # none has begun
    for _ in range(2):
        looks.expect()
        with pytest.warns(UserWarning, match="no optimizer holds the weight of 0, 1, while"):
            looks.look(module, optimizers)
        looks.look(module, optimizers)
