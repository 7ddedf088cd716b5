"""Preparation: exact on every kind of model, better at few bits, refused with a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from tests.attachment.preparation.nets import Block, Convolutional, Sequence, WrittenOut, uneven


def relative(new: Tensor, old: Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


@torch.no_grad()
def checked(model: nn.Module, x: Tensor, **options) -> lq.Preparation:
    """Prepare on x; the outputs on other data stay the same."""
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x)
    before = model(other)
    report = lq.prepare(model, [x], **options)
    assert relative(model(other), before) < 1e-5
    return report


def names(report):
    return {pair.name: pair.readers for pair in report.pairs}


def reasons(report):
    return {one.name: one.reason for one in report.left}


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, WrittenOut, lambda c: WrittenOut(c, bias=True)])
@pytest.mark.parametrize("power", [None, 0.5, 1])
def test_norms_of_transformers(norm, power):
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Linear(6, 16), Block(norm), Block(norm), norm(16), nn.Linear(16, 3)))
    report = checked(model, torch.randn(8, 5, 6), power=power)
    one, other = {f"{i}.norm1": (f"{i}.q", f"{i}.kv") for i in (1, 2)}, {f"{i}.norm2": (f"{i}.fc1",) for i in (1, 2)}
    assert names(report) == {**one, **other, "3": ("4",)}
    assert not report.left
    assert power is None or {pair.power for pair in report.pairs} == {power}
    with_bias = getattr(model[1].norm1, "bias", None) is not None
    assert (model[1].kv.bias is not None) == with_bias  # the shift needs one


def test_channels_have_one_range():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 4)))
    x = torch.randn(4096, 32)
    lq.prepare(model, [x], power=1)
    y = model[0](x).detach()
    low, high = torch.quantile(y, torch.tensor([0.001, 0.999]), dim=0)
    assert float((high - low).max() / (high - low).min()) < 1.1
    assert float((low + high).std()) < 0.05 * float((high - low).mean())


@pytest.mark.parametrize("equalize", ["weights", "activations"])
def test_layers_of_convolutions(equalize):
    torch.manual_seed(0)
    model = uneven(Convolutional())
    report = checked(model, torch.randn(4, 3, 12, 12), equalize=equalize)
    assert names(report) == {
        "norm": ("dw",),
        "dw": ("reduce", "grouped"),
        "reduce": ("expand",),
        "grouped": ("up",),
        "up": ("head",),
    }
    assert not any(pair.shifted for pair in report.pairs)
    assert [pair.power is None for pair in report.pairs] == [False, *[equalize == "weights"] * 4]


def test_equal_weights():
    """DFQ: rows of the first layer and columns of the second have one range; the oracle is its formula, solved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3))
    checked(model, torch.randn(2, 3, 8, 8), equalize="weights")
    rows, columns = model[0].weight.abs().amax((1, 2, 3)), model[2].weight.abs().amax((0, 2, 3))
    assert torch.allclose(rows, columns, rtol=1e-5)


def test_folded_networks():
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 8, 3), "n": nn.BatchNorm2d(8), "r": nn.ReLU(inplace=True), "b": nn.Conv2d(8, 4, 3)}
    model = Sequence(**parts).eval()
    left = checked(copy.deepcopy(model), torch.randn(2, 3, 8, 8), equalize="weights").left
    assert [str(one) for one in left] == ["a: batch_norm in n reads it (fold it first: lq.fold_batchnorm(model))"]
    lq.fold_batchnorm(model)
    assert names(checked(model, torch.randn(2, 3, 8, 8), equalize="weights")) == {"a": ("b",)}


def test_it_helps_at_few_bits():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Linear(6, 16), Block(), Block(), nn.LayerNorm(16), nn.Linear(16, 3)))
    x = torch.randn(64, 5, 6)

    @torch.no_grad()
    def error(net):
        quantized = lq.attach(copy.deepcopy(net), 4, 4, structure=lq.inspect(net, x), first_last=None)
        return relative(lq.calibrate(quantized, [x])(x), model(x))

    prepared = copy.deepcopy(model)
    lq.prepare(prepared, [x])
    assert error(prepared) < 0.8 * error(model)


def test_batches_are_all_read():
    """A channel that only the second batch shows is scaled by what it has there."""
    torch.manual_seed(0)
    first, second = torch.randn(64, 8), torch.randn(64, 8)
    first[:, 0] = 0
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    one, both = copy.deepcopy(model), copy.deepcopy(model)
    lq.prepare(one, [first], power=1)
    lq.prepare(both, iter([first, second]), power=1)
    assert both[0].weight[0] < 0.9 * one[0].weight[0]


class Read(nn.Module):
    """A norm, a layer, and something else that reads the norm."""

    def __init__(self, how) -> None:
        super().__init__()
        self.norm, self.fc, self.how = nn.LayerNorm(8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.how(self.fc(y), y, x)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda z, y, x: z + y, "add reads it, which cannot take a scale of channels"),
        (lambda z, y, x: z * F.gelu(y), "gelu reads it, which cannot take a scale of channels"),
        (lambda z, y, x: torch.cat([z, y]), "cat reads it, which cannot take a scale of channels"),
        (lambda z, y, x: (z, y), "it is an output of the model"),
        (lambda z, y, x: z * F.relu6(y), "relu6 clips it at a value that is the same for all channels"),
        (lambda z, y, x: z * (y * y), "mul reads it, which cannot take a scale of channels"),
    ],
)
def test_readers_that_cannot_take_the_scale(how, reason):
    model = uneven(Read(how))
    before = copy.deepcopy(model.state_dict())
    report = lq.prepare(model, [torch.randn(4, 8)])
    word, _, rest = reason.partition(" ")
    assert reasons(report)["norm"].replace("__", "").startswith(word)
    assert reasons(report)["norm"].endswith(rest)
    assert not report.pairs
    assert str(before) == str(model.state_dict())


def untouched(model: nn.Module, x: Tensor, **options):
    before = copy.deepcopy(model.state_dict())
    report = lq.prepare(model, [x], **options)
    assert not report.pairs
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return [str(one) for one in report.left]


def test_norms_of_queries_and_keys():
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.q_norm, self.k_norm = (
                nn.Linear(8, 8),
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.LayerNorm(8),
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q_norm(self.q(x)), self.k_norm(self.k(x)), x)

    reason = "scaled_dot_product_attention in the model reads it, which cannot take a scale of channels"
    assert untouched(uneven(Queries()), torch.randn(2, 5, 8)) == [f"q_norm: {reason}", f"k_norm: {reason}"]


def test_shared_weights():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    tied = Sequence(norm=nn.LayerNorm(8), a=first, act=nn.GELU(), b=second)
    second.weight = first.weight
    assert "a.weight, which reads it, is read elsewhere too" in untouched(uneven(tied), torch.randn(4, 8))[0]
    unused = Sequence(norm=nn.LayerNorm(8), a=nn.Linear(8, 8))
    unused.a.spare = nn.Linear(8, 8)
    unused.a.spare.weight = unused.a.weight
    assert untouched(uneven(unused), torch.randn(4, 8)) == ["norm: a.weight is shared with another module"]
    norms = Sequence(n1=nn.LayerNorm(8), a=nn.Linear(8, 8), n2=nn.LayerNorm(8), b=nn.Linear(8, 8))
    norms.n2.weight = norms.n1.weight
    assert untouched(uneven(norms), torch.randn(4, 8)) == ["n1: its weight is used by n1 and n2"]
    layer = nn.Linear(8, 8)
    twice = Sequence(n1=nn.LayerNorm(8), a=layer, n2=nn.LayerNorm(8), b=nn.Sequential(layer))
    assert all(
        "is read elsewhere too, or reads other tensors" in left for left in untouched(uneven(twice), torch.randn(4, 8))
    )


def test_frozen_parameters():
    model = uneven(Sequence(norm=nn.LayerNorm(8), a=nn.Linear(8, 8)))
    model.a.weight.requires_grad_(False)
    reason = "norm: a.weight is frozen (requires_grad=False) (pass frozen=True to change it too)"
    assert untouched(model, torch.randn(4, 8)) == [reason]
    assert names(checked(model, torch.randn(4, 8), frozen=True)) == {"norm": ("a",)}
    assert not model.a.weight.requires_grad
    assert model.norm.weight.requires_grad


def test_what_watches():
    model = uneven(Sequence(norm=nn.LayerNorm(8), a=nn.Linear(8, 8)))
    handle = model.a.register_forward_pre_hook(lambda *_: None)
    reason = "norm: a has a hook, which would see other values (remove the hook first)"
    assert untouched(model, torch.randn(4, 8)) == [reason]
    handle.remove()
    model.norm.forward = model.norm.forward
    reason = "norm: norm.forward was replaced on the instance (prepare before it is replaced)"
    assert untouched(model, torch.randn(4, 8)) == [reason]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(8, elementwise_affine=False), "it has no weight that could take the scale"),
        (nn.LayerNorm((4, 8)), "it normalizes over 2 dimensions, its weight is not of channels alone"),
    ],
)
def test_norms_without_channels(norm, reason):
    assert untouched(Sequence(norm=norm, a=nn.Linear(8, 3)), torch.randn(2, 4, 8)) == [f"norm: {reason}"]


def test_weights_without_numbers():
    model = uneven(Sequence(norm=nn.LayerNorm(8), a=nn.Linear(8, 8)))
    with torch.no_grad():
        model.a.weight[0, 0] = torch.inf
    report = lq.prepare(model, [torch.randn(4, 8)])
    assert [str(one) for one in report.left] == ["norm: a.weight has values that are not finite (load other weights)"]


def test_computed_weights():
    model = uneven(Sequence(norm=nn.LayerNorm(8), a=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))))
    assert untouched(model, torch.randn(4, 8)) == ["norm: a reads it, whose weight is computed, not a parameter"]


def test_channels_that_move_are_taken_back():
    """A reader that sees as many channels, in another order: only running the model tells."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.good, self.last = (
                nn.LayerNorm(8),
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.good(self.fc(self.norm(x).flip(-1))))

    report = checked(uneven(Moved()), torch.randn(16, 8))
    assert names(report) == {"good": ("last",)}
    assert reasons(report) == {"norm": "rescaling it with fc would change what the model computes"}


def test_branches_that_hardly_count():
    """A mistake that no output shows, as the branch is scaled by 1e-8 before it is added."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-8 * self.fc(self.norm(x).flip(-1))

    assert untouched(uneven(Branch()), torch.randn(16, 8)) == [
        "norm: rescaling it with fc would change what the model computes"
    ]


def test_channels_that_are_gathered():
    model = uneven(Sequence(norm=nn.LayerNorm(8), rows=nn.Flatten(), a=nn.Linear(24, 4)))
    assert untouched(model, torch.randn(2, 3, 8)) == ["norm: a reads it as 24 channels, not as its 8"]


def test_padding_takes_no_shift():
    class Channels(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    for padding, shifted in ((1, False), (0, True), ("same", False), ("valid", True)):
        model = uneven(Sequence(norm=Channels(8), a=nn.Conv2d(8, 4, 3, padding=padding)))
        report = checked(model, torch.randn(2, 8, 6, 6))
        assert [pair.shifted for pair in report.pairs] == [shifted]


def test_calls_in_attention_of_torch():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.attn(y, y, y, need_weights=False)[0]

    report = checked(uneven(Layer()), torch.randn(2, 5, 8))
    assert names(report) == {"norm": ("attn",)}


def test_double_precision_and_modes():
    model = uneven(Sequence(norm=nn.LayerNorm(8), a=nn.Linear(8, 8))).double().train()
    report = checked(model, torch.randn(16, 8).double())
    assert len(report.pairs) == 1
    assert model.training
    assert model.norm.weight.dtype == torch.float64


def test_the_report():
    report = lq.prepare(uneven(Read(lambda z, y, x: z)), [torch.randn(64, 8)], power=1)
    assert str(report).startswith("rescaled  kind  read by  channels  by ")
    assert "norm      norm  fc       8" in str(report)
    model = Sequence(norm=nn.LayerNorm(8), act=nn.GELU())
    assert "left: norm: gelu in act reads it" in str(lq.prepare(model, [torch.randn(4, 8)]))


def test_wrong_arguments():
    model, x = Sequence(norm=nn.LayerNorm(8), a=nn.Linear(8, 8)), torch.randn(4, 8)
    with pytest.raises(lq.SpecError, match="equalize='rows' is unknown; use 'weights', 'activations' or None"):
        lq.prepare(model, [x], equalize="rows")
    with pytest.raises(lq.SpecError, match="power=2 is no power of the ratio of ranges; use a number from 0 to 1"):
        lq.prepare(model, [x], power=2)
    with pytest.raises(lq.DataError, match="lq.prepare got no batches: the loader is empty; give it at least one"):
        lq.prepare(model, [])
    with pytest.raises(lq.DataError, match="what norm gives has 32 NaN or Inf"):
        lq.prepare(model, [x * torch.nan])
    with pytest.raises(lq.StateError, match="lq.prepare changes float weights, and this model has quantizers"):
        lq.prepare(lq.attach(model), [x])
