"""BatchNorm folding: exact where it folds, and left alone where it would not be."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import lq
from lq.attachment.folding import FoldedNorm
from lq.attachment.pairs import FoldablePair
from lq.errors import StateError


def randomize(model, seed=0):
    """Give every BatchNorm statistics and parameters of its own, far from the neutral ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 2 + 0.1)
                if module.affine:
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model


def convnet():
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4, eps=0.1), nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def assert_folds_exactly(model, x, left=()):
    """Fold, compare outputs in float64, and return the folded pairs."""
    model.eval().double()
    with torch.no_grad():
        before = model(x.double())
        pairs = lq.fold_batchnorm(model)
        after = model(x.double())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    assert norms(model) == list(left)
    return pairs


PAIRS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "without affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed2d in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 3, groups=2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "sync": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_fold_exactly(kind):
    conv, norm, shape = PAIRS[kind]
    model = randomize(nn.Sequential(conv, norm))
    assert assert_folds_exactly(model, torch.randn(shape)) == [FoldablePair("0", "1")]
    assert isinstance(model[1], nn.Identity)


def test_a_network_folds_in_float32_and_half_precision_keeps_its_dtype():
    model = convnet().eval()
    x = torch.randn(3, 1, 6, 6)
    before = model(x)
    assert [pair.norm for pair in lq.fold_batchnorm(model)] == ["1", "4"]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    half = convnet().bfloat16()
    lq.fold_batchnorm(half)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16}
    assert lq.fold_batchnorm(model) == []


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_byobnet"])
def test_timm_models_fold_exactly(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomize(timm.create_model(name))
    count = len(norms(model))
    pairs = assert_folds_exactly(model, torch.randn(2, 3, 64, 64))
    assert len(pairs) == count > 5
    if name == "test_efficientnet":
        assert any(isinstance(m, FoldedNorm) for m in model.modules())


class Net(nn.Module):
    """A convolution and a norm with some forward of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)


class TwoReaders(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class SharedNorm(Net):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class SharedConv(Net):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x + 1)


class ReadsWeight(Net):
    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class Between(Net):
    def forward(self, x):
        return self.norm(self.conv(x).relu())


class ControlFlow(Net):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > -1e9 else x


class TwoNames(Net):
    def __init__(self):
        super().__init__()
        self.again = nn.Sequential(self.conv)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.again(x)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(x)


class NoStatistics(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    "make", [TwoReaders, SharedNorm, SharedConv, ReadsWeight, Between, ControlFlow, TwoNames, Tied, NoStatistics]
)
def test_pairs_that_are_left_alone(make):
    model = randomize(make()) if make is not NoStatistics else make()
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    before, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    assert lq.fold_batchnorm(model) == []
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Options(Net):
    """Folds although its forward has options, a branch that is not taken, and stores what it computed."""

    def forward(self, x, scale=None):
        self.seen = self.norm(self.conv(x))
        return self.seen if scale is None else self.seen * scale


def test_options_and_stored_values_do_not_keep_a_pair_from_folding():
    model = randomize(Options())
    assert assert_folds_exactly(model, torch.randn(2, 3, 8, 8)) == [FoldablePair("conv", "norm")]
    assert isinstance(model.seen, torch.Tensor)


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Padded(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize(("kind", "left"), [(Standardized, ["1"]), (Padded, [])])
def test_classes_of_their_own_fold_only_if_they_compute_the_same(kind, left):
    torch.manual_seed(0)
    model = randomize(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)))
    assert len(assert_folds_exactly(model, torch.randn(2, 3, 8, 8), left)) == 1 - len(left)


NORMALIZED = {
    "weight_norm parametrization": nn.utils.parametrizations.weight_norm,
    "spectral_norm parametrization": nn.utils.parametrizations.spectral_norm,
    "weight_norm hook": nn.utils.weight_norm,
    "spectral_norm hook": nn.utils.spectral_norm,
    "pruning mask": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("kind", NORMALIZED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_are_not_spoiled(kind):
    torch.manual_seed(0)
    model = randomize(nn.Sequential(NORMALIZED[kind](nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    model.eval()
    before = model(x)
    lq.fold_batchnorm(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_weights_with_quantizers_are_refused():
    model = lq.attach(convnet())
    with pytest.raises(StateError, match=r"BatchNorm cannot be folded into weights that have quantizers: lq.detach"):
        lq.fold_batchnorm(model)
    assert norms(model) == ["1", "4"]


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_an_unfolded_checkpoint_loads_into_a_folded_model(attach, prefix):
    wrap = nn.Sequential if prefix else (lambda m: m)
    model, other = wrap(convnet()).eval(), wrap(randomize(convnet(), 3)).eval()
    state = other.state_dict()
    keys = list(state)
    lq.fold_batchnorm(model)
    if attach:
        lq.attach(model, 8)
    model.load_state_dict(state)
    assert list(state) == keys
    x = torch.randn(2, 1, 6, 6)
    if attach:
        lq.detach(model)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


def test_a_folded_checkpoint_loads_into_a_folded_model():
    model, other = convnet().eval(), randomize(convnet(), 3).eval()
    lq.fold_batchnorm(model)
    lq.fold_batchnorm(other)
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(model(x), other(x))


def test_folded_networks_train():
    model = convnet()
    lq.fold_batchnorm(model)
    model.train()(torch.randn(2, 1, 6, 6)).sum().backward()
    assert model[0].bias.requires_grad
    assert model[0].bias.grad.abs().sum() > 0


# --- norms before a convolution, frozen norms -------------------------------------------------------------------


def statistics(norm):
    """Give a norm statistics and parameters that matter."""
    generator = torch.Generator().manual_seed(3)
    for tensor, low in ((norm.running_mean, -1.0), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -1.0)):
        tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_before_a_convolution_that_does_not_pad(bias, groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), statistics(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, bias=bias, groups=groups)).eval()
    unfolded, x = copy.deepcopy(model), torch.randn(2, 4, 8, 8)
    expected = model(x)
    assert lq.fold_batchnorm(model) == [FoldablePair("2", "1", norm_first=True)]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(unfolded.state_dict())  # is folded on the way in
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_before_zero_padding_stays():
    model = nn.Sequential(nn.ReLU(), statistics(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding=1)).eval()
    assert lq.fold_batchnorm(model) == []


def test_a_norm_between_two_convolutions_goes_into_the_first():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), statistics(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 1)).eval()
    assert lq.fold_batchnorm(model) == [FoldablePair("0", "1")]


def test_frozen_norms():
    norm = torchvision.ops.FrozenBatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), statistics(norm)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert lq.fold_batchnorm(model) == [FoldablePair("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_frozen_timm_norms():
    from timm.layers import freeze_batch_norm_2d

    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            statistics(norm)
    x = torch.randn(2, 3, 64, 64)
    freeze_batch_norm_2d(model)
    expected = model(x)
    assert len(lq.fold_batchnorm(model)) > 5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
