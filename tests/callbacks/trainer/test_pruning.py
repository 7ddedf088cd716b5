"""ModelPruning prunes a quantized module as it prunes the float one; what cannot be is refused with the reason."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lq
from lq.attachment.sites import float_weight, layers
from lq.callbacks import FineTune, Quantize, ReduceBits
from lq.errors import StateError
from tests.helpers import QUIET, assert_same, fit, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def pruning(**kwargs):
    options = {"amount": 0.5, "use_lottery_ticket_hypothesis": False, **kwargs}
    return ModelPruning(options.pop("pruning_fn", "l1_unstructured"), **options)


def quantize(bits=8, **kwargs):
    return Quantize(bits, 8, fold_bn=False, first_last=None, **kwargs)


def zeros(module, quantized=False):
    """Where the weights of layers are zero, by name; of the float ones or of what the layers compute."""
    return {name: (layer.weight if quantized else float_weight(layer)) == 0 for name, layer in layers(module)}


KINDS = {
    "global": {},
    "local": {"use_global_unstructured": False},
    "structured": {
        "pruning_fn": "ln_structured",
        "use_global_unstructured": False,
        "pruning_dim": 0,
        "pruning_norm": 1,
        "parameter_names": ["weight"],
    },
    "lottery": {"use_lottery_ticket_hypothesis": True},
    "weights alone": {"parameter_names": ["weight"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_is_pruned_as_without_quantization(kind):
    """With a rate of zero weights stay, so that what is pruned is told by them alone."""
    norm = kind != "structured"  # whole channels of vectors cannot be pruned
    plain, module = tiny(lr=0.0, norm=norm), tiny(lr=0.0, norm=norm)
    fit(plain, [pruning(**KINDS[kind])], max_epochs=2)
    fit(module, [quantize(), pruning(**KINDS[kind])], max_epochs=2)
    expected = zeros(plain)
    assert 0.4 < torch.cat([z.flatten() for z in expected.values()]).float().mean() < 0.95
    assert_same(zeros(module), expected)
    biases = {name: p for name, p in plain.named_parameters() if name.endswith("bias")}
    assert_same({name: p for name, p in module.named_parameters() if name.endswith("bias")}, biases)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("stages", [[], [FineTune]], ids=["Quantize", "FineTune"])
def test_zeros_stay_zeros_while_training(bits, stages):
    module = tiny()
    before = {name: float_weight(layer).detach().clone() for name, layer in layers(module)}
    parameters = {name: float_weight(layer) for name, layer in layers(module)}
    fit(module, [quantize(bits), *(stage("lsq") for stage in stages), pruning()], max_epochs=3)
    masked, computed = zeros(module), zeros(module, quantized=True)
    share = torch.cat([z.flatten() for z in masked.values()]).float().mean()
    assert 0.4 < share < 0.95
    for name, mask in masked.items():
        assert computed[name][mask].all()
        layer = module.get_submodule(name)
        assert float_weight(layer) is parameters[name]  # made permanent: the Parameter that it was
        assert mask.all() or (float_weight(layer)[~mask] != before[name][~mask]).any()
    assert not [key for key in module.state_dict() if key.endswith(("_orig", "_mask"))]
    module.eval()
    x = loader(4).dataset.tensors[0]
    with torch.no_grad():
        assert torch.equal(module(x), module(x))


def test_checkpoints_load(tmp_path):
    module, saver = tiny(), ModelCheckpoint(tmp_path, save_last=True)
    fit(module, [quantize(4), FineTune("lsq"), pruning(), saver], max_epochs=2, enable_checkpointing=True)
    again = tiny(3)
    trainer([quantize(4)]).validate(again, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert sum(int(z.sum()) for z in zeros(again, quantized=True).values()) > 50
    fit(tiny(3), [quantize(4), FineTune("lsq"), pruning()], max_epochs=3, ckpt_path=tmp_path / "last.ckpt")


def test_an_explicit_list_and_a_second_fit():
    module = tiny()
    chosen = [(module.net[3], "weight"), (module.net[0], "bias")]
    callbacks = [quantize(), pruning(parameters_to_prune=chosen)]
    fit(module, callbacks)
    assert [int(z.sum()) for z in zeros(module).values()][0::2] == [0, 0]
    assert int(zeros(module)["net.3"].sum()) > 50
    with torch.no_grad():
        torch.nn.init.normal_(float_weight(module.net[3]))
    fit(module, callbacks)
    assert int(zeros(module)["net.3"].sum()) > 50


def test_evaluating_before_fitting(tmp_path):
    module, saver = tiny(), ModelCheckpoint(tmp_path, save_last=True)
    fit(module, [quantize(), saver], enable_checkpointing=True)
    callbacks, again = [quantize(), pruning()], tiny()
    trainer(callbacks).validate(again, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    fit(again, callbacks)
    assert sum(int(z.sum()) for z in zeros(again).values()) > 50


def test_what_was_attached_by_hand():
    module = tiny()
    lq.attach(module, 4)
    fit(module, [FineTune("ste"), pruning()])
    assert sum(int(z.sum()) for z in zeros(module).values()) > 50


def test_a_filter_of_ones_own_sees_the_layers():
    class Chosen(ModelPruning):
        def filter_parameters_to_prune(self, parameters_to_prune=()):
            return [(m, n) for m, n in parameters_to_prune if isinstance(m, nn.Linear) and n == "weight"]

    module = tiny()
    fit(module, [quantize(), Chosen("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)])
    assert [int(z.sum()) > 0 for z in zeros(module).values()] == [False, False, True]


@pytest.mark.parametrize("attached", [False, True])
def test_the_other_order_is_refused(attached):
    module = tiny()
    if attached:
        fit(module, [quantize()])
    with pytest.raises(StateError, match=r"ModelPruning is listed before Quantize .*list Quantize before it"):
        fit(module, [pruning(), quantize()])


def test_drawing_new_weights_is_refused():
    with pytest.raises(StateError, match=r"resample_parameters=True"):
        fit(tiny(), [quantize(), pruning(use_lottery_ticket_hypothesis=True, resample_parameters=True)])


def test_one_bit_has_no_zero():
    with pytest.raises(StateError, match=r"cannot prune net\.3: the weight's grid has no zero"):
        fit(tiny(), [quantize(overrides={"net.3": {"weights": 1}}), pruning()])
    module = tiny()
    fit(
        module,
        [quantize(overrides={"net.3": {"weights": 1}}), pruning(parameters_to_prune=[(module.net[0], "weight")])],
    )
    assert int(zeros(module)["net.0"].sum()) == 18


def test_widths_that_come_down_to_one_bit_are_told():
    with pytest.warns(UserWarning, match=r"pruned weights of net\.0, net\.3, net\.8 are not zero any more"):
        fit(tiny(), [quantize(1), ReduceBits(4), FineTune("lsq"), pruning()], max_epochs=2)


# --- by hand, and other libraries -----------------------------------------------------------------------------------


def test_masks_by_hand_on_the_float_weight():
    module = lq.attach(tiny(), 4, first_last=None)
    prune.l1_unstructured(module.net[3].parametrizations.weight, "original", 0.5)
    fit(module, [FineTune("lsq")], max_epochs=2)
    assert int((module.net[3].weight == 0).sum()) >= 72
    prune.remove(module.net[3].parametrizations.weight, "original")
    lq.detach(module)
    assert int((module.net[3].weight == 0).sum()) == 72 and isinstance(module.net[3].weight, nn.Parameter)


def values_read(convolution):
    """What a convolution of 3 x 3 multiplies with: its outputs for an impulse in each channel; one row a channel."""
    impulses = torch.zeros(4, 4, 3, 3)
    impulses[range(4), range(4), 1, 1] = 1.0
    with torch.no_grad():
        return convolution(impulses).transpose(0, 1).flatten(1)


MADE = {
    "pruning mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_others_make_are_quantized_where_they_are_used(kind):
    """What the convolution reads has few values; the Parameters behind it are trained."""
    module = tiny()
    MADE[kind](module.net[3])
    before = {name: p.detach().clone() for name, p in module.net[3].named_parameters()}
    fit(module, [quantize(2), FineTune("lsq")], max_epochs=2)
    after = dict(module.net[3].named_parameters())
    assert before and all(not torch.equal(after[name], value) for name, value in before.items() if value.ndim > 1)
    assert [name for name in lq.attachment.sites.calls(module) if name.startswith("net.3.")]
    assert all(len(row.unique()) <= 4 for row in values_read(module.net[3].eval()))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrizations_of_a_quantized_weight_are_refused():
    module = lq.attach(tiny(), 4)
    parametrize.register_parametrization(module.net[3], "weight", Doubled())
    with pytest.raises(StateError, match=r"net\.3\.weight has the parametrization Doubled beside its quantizer"):
        fit(module, [Quantize(4, None)])


class LowRank(nn.Module):
    """As adapters of parameter-efficient tuning: a frozen layer and two small ones beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_train_beside_a_frozen_layer():
    module = tiny()
    for part in module.net:
        part.requires_grad_(False)
    module.net[8] = LowRank(module.net[8])
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.05)
    before = {name: float_weight(layer).detach().clone() for name, layer in layers(module)}
    fit(module, [quantize(4), FineTune("lsq")], max_epochs=2)
    moved = {name for name, layer in layers(module) if not torch.equal(float_weight(layer), before[name])}
    assert moved == {"net.8.down", "net.8.up"}


def test_a_norm_of_weights_that_was_put_on_between_two_fits_is_refused():
    module = tiny()
    fit(module, [Quantize(4, 4), FineTune()])
    parametrizations.spectral_norm(module.net[3])
    with pytest.raises(lq.StateError, match=r"net.3.weight has the parametrization _SpectralNorm beside"):
        fit(module, [FineTune()])
