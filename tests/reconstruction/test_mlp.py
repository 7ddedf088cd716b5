"""MLPs with ReLUs in the place of GELUs: which are found, what is fitted, against what is written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.relu import relus_in
from lq.attachment.sites import float_weight, weight_quantizer
from lq.errors import DataError, DivergenceError, SpecError
from lq.reconstruction.mlp import find_mlps, reconstruct_mlps
from lq.reconstruction.mlp_fit import MLP, MLPFit, MLPOptions
from lq.reconstruction.storage import Storage
from lq.structure.tracing import trace
from tests.helpers import assert_same, hooks
from tests.models import Block
from tests.reconstruction.networks import Tokens, samples

FAST = MLPOptions(iterations=150, batch_size=8, lr=3e-3)


class Mlp(nn.Module):
    """As timm's: dropouts and an identity between."""

    def __init__(self, act=nn.GELU):
        super().__init__()
        self.fc1, self.act, self.drop1, self.norm, self.fc2 = (
            nn.Linear(8, 16), act(), nn.Dropout(0.1), nn.Identity(), nn.Linear(16, 8),
        )  # fmt: skip

    def forward(self, x):
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


class Odd(nn.Module):
    """GELUs that are no part of an MLP, each for another reason."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.read, self.twice, self.normed = nn.GELU(), nn.GELU(), nn.GELU()
        self.norm, self.mlp = nn.LayerNorm(8), Mlp()

    def forward(self, x):
        inner = self.a(x)
        x = self.b(self.read(inner)) + inner  # others read what the GELU reads
        x = self.c(self.twice(self.twice(x)))
        x = self.mlp(self.norm(self.normed(x)))
        return F.gelu(x)


def found_in(model, x):
    with torch.no_grad():
        return find_mlps(model.eval(), trace(model, lambda: model(x), x))


def test_those_between_two_linear_layers_are_found():
    torch.manual_seed(0)
    x = samples((3, 8, 8), 2)
    assert found_in(Tokens(), x) == (
        [MLP(f"blocks.{i}.mlp.0", f"blocks.{i}.mlp.1", f"blocks.{i}.mlp.2") for i in (0, 1)],
        [],
    )
    assert found_in(Mlp(), samples((5, 8), 2)) == ([MLP("fc1", "act", "fc2")], [])
    assert found_in(Mlp(nn.ReLU), samples((5, 8), 2)) == ([], [])


def test_others_are_left_with_a_reason():
    torch.manual_seed(0)
    mlps, left = found_in(Odd(), samples((5, 8), 2))
    assert mlps == [MLP("mlp.fc1", "mlp.act", "mlp.fc2")]
    between = "it does not stand between two linear layers that nothing else reads"
    assert dict(left) == {
        "read": between, "twice": "it is used several times", "normed": between, "Odd": "it is called as a function",
    }  # fmt: skip


def test_shared_weights_are_left():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert found_in(model, samples((8,), 2))[0] == []


def prepared(**options):
    torch.manual_seed(0)
    model, data = Tokens().eval(), list(samples((3, 8, 8), 24).split(8))
    return model, data


def mlp_error(model, before, data, i):
    """The error of one MLP on what it reads in the network as it was, over the variance of what it gave."""
    reads = []
    handle = before.blocks[i].mlp.register_forward_pre_hook(lambda m, args: reads.append(args[0]))
    with torch.no_grad():
        for x in data:
            before(x)
        handle.remove()
        x = torch.cat(reads)
        y = before.blocks[i].mlp(x)
        return ((model.blocks[i].mlp(x) - y).square().mean() / y.var(correction=0)).item()


@pytest.mark.parametrize("attached", [False, True])
def test_layers_are_fitted_to_what_the_mlp_gave(attached):
    model, data = prepared()
    before, _ = prepared()
    if attached:
        lq.attach(model, 4, 4, structure=lq.inspect(model, data[0]), first_last=None)
    found = reconstruct_mlps(model, data, FAST)
    plain = lq.detach(model) if attached else model
    assert relus_in(plain) == ["blocks.0.mlp.1", "blocks.1.mlp.1"] == [one.name for one in found.mlps]
    for i, one in enumerate(found.mlps):
        assert one.after < 0.3 * one.before
        assert one.after == pytest.approx(mlp_error(plain, before, data, i), rel=1e-3)
        swapped, _ = prepared()
        swapped.blocks[i].mlp[1] = nn.ReLU()
        assert one.before == pytest.approx(mlp_error(swapped, before, data, i), rel=1e-3)
    others = {n for n, _ in before.named_parameters() if ".mlp." not in n}
    assert_same(
        {n: p for n, p in plain.named_parameters() if n in others},
        {n: p for n, p in before.named_parameters() if n in others},
    )
    assert "2 GELUs are ReLUs now" in str(found)


def test_quantizers_know_the_range_of_fitted_weights():
    model, data = prepared()
    lq.attach(model, 4, 4, structure=lq.inspect(model, data[0]), first_last=None)
    reconstruct_mlps(model, data, FAST)
    layer = model.blocks[0].mlp[2]
    step = weight_quantizer(layer).log2_step.clone()
    weight_quantizer(layer).calibrate(float_weight(layer))
    assert torch.equal(weight_quantizer(layer).log2_step, step)
    lq.calibrate(model, data)
    assert model.blocks[0].mlp[2].input_quantizer.zero_point == 0  # nothing below 0 is left


def fit_of(model, data, options, **more):
    mlp = MLP("blocks.0.mlp.0", "blocks.0.mlp.1", "blocks.0.mlp.2")
    reads = []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda m, args: reads.append(args[0]))
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    storage = Storage(torch.device("cpu"), 10**9)
    mean = more.get("mean", lambda t: t)
    return MLPFit(model, mlp, [storage.keep(x) for x in reads], options, mean, more.get("ranks", 1)), torch.cat(reads)


def test_the_loss_has_both_terms():
    model, data = prepared()
    fit, x = fit_of(model, data, MLPOptions(quantile=0.9, clipped=3.0))
    fit.limit = fit._quantile()
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        inner, y = F.relu(mlp[0](x)), mlp(x)
        gelus = [F.gelu(mlp[0](part)) for part in x.split(8)]
        limit = torch.stack([values[values > 0].quantile(0.9) for values in gelus]).mean()
        terms = [(mlp[2](part) - y).square().mean() for part in (inner, inner.clamp(max=limit))]
    assert fit.limit == pytest.approx(limit.item(), rel=1e-5)
    assert fit._loss(x).item() == pytest.approx((terms[0] + 3 * terms[1]).item(), rel=1e-5)
    alone, _ = fit_of(model, data, MLPOptions(clipped=0.0))
    assert alone._loss(x).item() == pytest.approx(terms[0].item(), rel=1e-5)
    assert alone.limit == math.inf


def test_each_step_has_other_samples_and_ranks_share_them():
    model, data = prepared()
    fit, x = fit_of(model, data, MLPOptions(batch_size=10))
    order = fit._order()
    taken = torch.cat([next(order) for _ in range(12)])
    assert len(taken) == 120 and taken.bincount().tolist() == [5] * 24
    assert torch.equal(fit._rows(torch.tensor([1, 9, 20])), x[[1, 9, 20]])
    assert len(next(fit_of(model, data, MLPOptions(batch_size=10), ranks=2)[0]._order())) == 5


def test_two_ranks_with_the_same_samples_do_what_one_does():
    states = []
    for ranks in (1, 2):
        model, data = prepared()
        options = MLPOptions(iterations=10, batch_size=8 * ranks, lr=1e-3)
        reduce = (lambda t, _: t * 2) if ranks > 1 else None
        found = reconstruct_mlps(model, data, options, reduce=reduce, ranks=ranks)
        states.append((dict(model.state_dict()), [one.after for one in found.mlps]))
    assert_same(*states)


def test_the_seed_decides_and_memory_does_not():
    found = []
    for seed, memory in ((0, "1GB"), (0, 10), (1, "1GB")):
        model, data = prepared()
        reconstruct_mlps(model, data, MLPOptions(iterations=10, lr=1e-3, batch_size=8, seed=seed, memory=memory))
        found.append(dict(model.state_dict()))
    assert_same(found[0], found[1])
    assert not torch.equal(found[0]["blocks.0.mlp.0.weight"], found[2]["blocks.0.mlp.0.weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_nothing_behind(fails):
    model, data = prepared()
    model.train().blocks[0].eval()
    model.head.bias.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    state, random, hooked = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state(), hooks(model)

    def watch(steps, name):
        for step in steps:
            if fails and name == "blocks.1.mlp.1":
                raise InterruptedError
            yield step

    if fails:
        with pytest.raises(InterruptedError):
            reconstruct_mlps(model, data, FAST, watch=watch)
        assert_same(dict(model.state_dict()), state)
    else:
        reconstruct_mlps(model, data, FAST, watch=watch)
        assert len(relus_in(model)) == 2
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert torch.equal(torch.get_rng_state(), random) and hooks(model) == hooked


def test_what_goes_wrong_leaves_the_model_as_it_was():
    model, data = prepared()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match="MLP reconstruction got no batches: the loader is empty"):
        reconstruct_mlps(model, [], FAST)
    with pytest.raises(DivergenceError, match=r"MLP reconstruction of blocks.0.mlp.1 diverged: lower lr=inf"):
        reconstruct_mlps(model, data, MLPOptions(iterations=2, lr=math.inf))
    assert_same(dict(model.state_dict()), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations=0 and batch_size=32 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"quantile": 1.5}, "quantile=1.5 a share above 0"),
        ({"clipped": -1.0}, "clipped=-1.0 not negative"),
        ({"memory": 0}, "memory=0; give a number of bytes"),
    ],
)
def test_options(change, message):
    with pytest.raises(SpecError, match=message):
        MLPOptions(**change)


def test_rates():
    assert MLPOptions().rate == 4e-5
    assert MLPOptions(iterations=5_000).rate == pytest.approx(16e-5)
    assert MLPOptions(iterations=10).rate == pytest.approx(4e-4)
    assert MLPOptions(lr=0.1).rate == 0.1


def test_a_block_with_attention_keeps_what_counts_its_calls():
    torch.manual_seed(0)
    data = [samples((5, 8), 8)]
    model = nn.Sequential(Block(), nn.Linear(8, 3)).eval()
    lq.attach(model, 8, 8, structure=lq.inspect(model, data[0]), first_last=None, skip=True)
    hooked = hooks(model)
    reconstruct_mlps(model, data, FAST)
    assert hooks(model) == hooked
    lq.calibrate(model, data)
    with torch.no_grad():
        quantized = model(data[0])
        whole = lq.detach(model)(data[0])
    assert (quantized - whole).square().mean() < 0.02 * whole.var()
