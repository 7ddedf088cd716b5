"""Which BatchNorms are sure to be foldable: outputs stay as they are on every path, and what is left says why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import lq
from lq.attachment.foldable import foldable_pairs
from lq.attachment.folding import left_unfolded
from lq.attachment.pairs import FoldablePair
from tests.attachment.test_folding import randomize

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ACTED_ON = pytest.mark.filterwarnings("ignore:.*stayed unfolded")


class Block(nn.Module):
    """A convolution and a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x))


class Around(nn.Module):
    """A network with a block in it."""

    def __init__(self, block=None):
        super().__init__()
        self.block = block or Block()


class OtherInEval(Block):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)) if self.training else self.other(self.conv(x))


class NoneInEval(Block):
    def forward(self, x):
        return self.norm(self.conv(x)) if self.training else self.conv(x)


class Switch(Block):
    def forward(self, x, normalize=True):
        return self.norm(self.conv(x)) if normalize else self.conv(x)


class Flag(Block):
    normalize: bool

    def __init__(self):
        super().__init__()
        self.normalize = True

    def forward(self, x):
        x = self.conv(x)
        return self.normalized(x) if self.normalize else x

    def normalized(self, x):
        return self.norm(x)

    def set_to(self, value):
        self.normalize = value
        return self


class Mode(Block):
    def forward(self, x, mode="full"):
        x = self.conv(x)
        return x if mode == "raw" else self.norm(x)


class Depth(Block):
    def forward(self, x, depth=2):
        x = self.conv(x)
        return x if depth < 2 else self.norm(x)


class Mask(Block):
    def forward(self, x, mask=None):
        x = self.conv(x)
        return self.norm(x) if mask is None else x * mask


class LeavesOut(Around):
    def __init__(self):
        super().__init__(Switch())

    def forward(self, x):
        return self.block(x, normalize=False)


class Keeps(Block):
    def forward(self, x):
        self.seen = self.conv(x)
        return self.norm(self.seen)


class Collects(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.clear()
        self.seen.append(self.conv(x))
        return self.norm(self.seen[0])


class ByItself(Around):
    def forward(self, x):
        return self.block(x) + self.block.conv(x)


class ByItselfUnderControlFlow(Around):
    def forward(self, x):
        return x if x.sum() > 1e9 else self.block(x) + self.block.conv(x)


class ReadsWeight(Around):
    def forward(self, x):
        return self.block(x) + F.conv2d(x, self.block.conv.weight)


class ReadsWeightUnderControlFlow(Around):
    def forward(self, x):
        return x if x.sum() > 1e9 else self.block(x) + F.conv2d(x, self.block.conv.weight)


class Functional(Around):
    def __init__(self):
        super().__init__()
        self.average = {key: value * 0.9 for key, value in self.block.state_dict().items() if value.is_floating_point()}

    def forward(self, x):
        return self.block(x) + torch.func.functional_call(self.block, self.average, (x,))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        seen = []
        for layer in self.net:
            x = layer(x)
            seen.append(x)
        return seen


class Slice(Loop):
    def forward(self, x):
        return self.net(x) + self.net[:1](x)


class Features(Block):
    def features(self, x):
        return self.conv(x)


class FeaturesOfPart(Loop):
    def forward(self, x):
        return self.net(x)

    def features(self, x):
        return self.net[0](x)


def replaced(part):
    block = Block()
    module = block if part == "block" else block.conv
    before = module.forward
    module.forward = lambda x: 2 * before(x)
    return block


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x


def parametrized(part, name):
    block = Block()
    parametrize.register_parametrization(getattr(block, part), name, Doubled())
    return block


def outputs(run):
    """All tensors of a run in eval mode."""
    result = run if isinstance(run, (list, tuple)) else [run]
    return [t.detach().clone() for t in result]


PLAIN = {
    "another norm in eval": (OtherInEval, lambda m: m(X), "without the other|read by others"),
    "no norm in eval": (NoneInEval, lambda m: m(X), "without the other|read by others"),
    "kept in an attribute": (Keeps, lambda m: [m(X), m.seen], "what conv gives is kept"),
    "kept in a list": (Collects, lambda m: [m(X), m.seen[0]], "what conv gives is kept"),
    "called by itself": (ByItself, lambda m: m(X), "called without the other|read by others"),
    "called by itself, untraceable": (ByItselfUnderControlFlow, lambda m: m(X), "forward calls only one"),
    "weight read outside": (ReadsWeight, lambda m: m(X), "a parameter of block.conv is also read"),
    "weight read outside, untraceable": (ReadsWeightUnderControlFlow, lambda m: m(X), "reads a parameter of the two"),
    "other parameters": (Functional, lambda m: m(X), "with other parameters than their own"),
    "collected in a loop": (Loop, lambda m: m(X), "read by others"),
    "slice": (Slice, lambda m: m(X), "forward calls only one of the two"),
    "another method": (Features, lambda m: [m(X), m.features(X)], "Features.features calls only one of the two"),
    "a part in another method": (FeaturesOfPart, lambda m: [m(X), m.features(X)], "features calls only one"),
    "switch": (Switch, lambda m: [m(X), m(X, False)], "normalize decides"),
    "flag": (Flag, lambda m: [m.set_to(False)(X), m.set_to(True)(X)], "normalize decides: if it is set otherwise"),
    "string": (Mode, lambda m: [m(X), m(X, "raw")], "mode decides"),
    "number": (Depth, lambda m: [m(X), m(X, 1)], "depth decides"),
    "optional": (Mask, lambda m: [m(X), m(X, torch.ones(()))], "mask decides"),
    "computed bias": (lambda: parametrized("conv", "bias"), lambda m: m(X), "computed"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("example", [None, X], ids=["", "example"])
@pytest.mark.parametrize("kind", PLAIN)
@ACTED_ON
def test_outputs_stay_on_every_path(kind, example, training):
    make, run, reason = PLAIN[kind]
    torch.manual_seed(0)
    model = randomize(make()).eval()
    before, keys = outputs(run(model)), list(model.state_dict())
    model.train(training)
    [left] = {norm.norm: norm for norm in left_unfolded(model) if "other" not in norm.norm}.values()
    assert reason is None or any(part in left.reason for part in reason.split("|")), left
    assert lq.fold_batchnorm(model, example) == []
    assert list(model.state_dict()) == keys
    assert {m.training for m in model.modules()} == {training}
    for old, new in zip(before, outputs(run(model.eval())), strict=True):
        torch.testing.assert_close(new, old)


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("part", ["conv", "norm"])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_keep_what_they_see(register, part):
    model, seen = randomize(Block()).eval(), []
    if part == "conv" and register == "register_forward_pre_hook":
        pytest.skip("hooks before a convolution may compute its weight: such pairs are none")
    getattr(getattr(model, part), register)(lambda *args: seen.append(args[1][0].detach().sum()))

    def run():
        seen.clear()
        model(X.clone().requires_grad_()).sum().backward()
        return torch.stack(seen)

    before = run()
    with pytest.warns(lq.NoEffectWarning, match=rf"norm behind conv: {part} has a hook.*\(remove the hook first\)"):
        assert lq.fold_batchnorm(model) == []
    assert torch.equal(run(), before)


def test_a_hook_on_a_sequential_between_them():
    model = randomize(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8))).eval()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    before = model(X)
    with pytest.warns(lq.NoEffectWarning, match=r"1 behind 0.0: 0 has a hook"):
        lq.fold_batchnorm(model)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("part", ["block", "conv"])
def test_a_forward_that_was_replaced(part):
    model = randomize(replaced(part)).eval()
    before = model(X)
    with pytest.warns(lq.NoEffectWarning, match="was replaced on the instance"):
        assert lq.fold_batchnorm(model) == []
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(name, value):
    model = Block()
    getattr(model.norm, name).data[3] = value
    weight = model.conv.weight.detach().clone()
    with pytest.warns(lq.NoEffectWarning, match=rf"norm.{name} has values that are not finite"):
        assert lq.fold_batchnorm(model) == []
    assert torch.equal(model.conv.weight, weight)


def test_a_folded_weight_that_half_precision_cannot_hold():
    model = Block().half()
    model.norm.running_var.fill_(1e-7)
    model.norm.eps = 0.0
    model.conv.weight.data.fill_(300.0)
    assert lq.fold_batchnorm(model) == []
    assert model.conv.weight.eq(300).all()


class Scales(Block):
    """Takes arguments that do not come between the two."""

    def forward(self, x, scale=None, bias=True, kind="relu", power=2):
        y = self.norm(self.conv(x))
        y = y if scale is None else y * scale
        y = y + 1 if bias else y
        return y.relu() if kind == "relu" else y**power


class Lists(nn.Module):
    """Convolutions and norms in lists of their own."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x


class Stem(Block):
    """Another method runs both, one that forward uses runs one."""

    def start(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.norm(self.start(x))

    def features(self, x):
        return self.norm(self.conv(x)).relu()


SURE = {
    "arguments elsewhere": (Scales, 1, lambda m: [m(X), m(X, 2.0, False, "none", 3)]),
    "lists": (Lists, 2, lambda m: m(X)),
    "methods": (Stem, 1, lambda m: [m(X), m.features(X)]),
}


@pytest.mark.parametrize("kind", SURE)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_sure_is_folded(kind, training):
    make, count, run = SURE[kind]
    torch.manual_seed(0)
    model = randomize(make()).eval()
    before = outputs(run(model))
    pairs = lq.fold_batchnorm(model.train(training))
    assert len(pairs) == count
    assert left_unfolded(model) == []
    for old, new in zip(before, outputs(run(model.eval())), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_checkpoints_may_have_folded_what_is_not_sure():
    for make in (OtherInEval, Switch, Keeps, Features):
        assert FoldablePair("conv", "norm") in foldable_pairs(make())
    hooked = Block()
    hooked.norm.register_forward_hook(lambda *args: None)
    assert foldable_pairs(hooked) == [FoldablePair("conv", "norm")]


def test_norms_of_a_forward_with_control_flow_are_listed():
    class Conditional(Block):
        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    [left] = left_unfolded(Conditional())
    assert (left.norm, left.conv, left.advice) == ("norm", "conv", "")
    assert "Conditional.forward cannot be followed" in left.reason
