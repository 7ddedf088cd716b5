"""Checkpointing of every kind, off for a while: each module runs once, gradients are those of a plain run."""

import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lq
from lq.calibration.batchnorm import batchnorms
from lq.errors import StateError
from lq.structure.recomputation import without_recomputation
from tests.helpers import assert_same

KINDS = ["reentrant", "not reentrant", "sequential", "wrapper", "composable", "attribute"]


class Net(nn.Module):
    """Two blocks, with checkpointing of a kind."""

    def __init__(self, kind=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        self.head = nn.Linear(8, 3)
        self.kind = kind
        self.grad_checkpointing = kind == "attribute"
        if kind == "wrapper":
            self.blocks[0][0] = checkpoint_wrapper(self.blocks[0][0])
        if kind == "composable":
            composable = pytest.importorskip("torch.distributed._composable.checkpoint_activation")
            composable.checkpoint(self.blocks[0])

    def forward(self, x):
        x = self.stem(x)
        if self.kind == "reentrant" or self.grad_checkpointing:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
        elif self.kind == "not reentrant":
            x = checkpoint(self.blocks, x, use_reentrant=False)
        elif self.kind == "sequential":
            x = checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        return self.head(x)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def backward(model):
    """Gradients of a run, and how often the first layer of the blocks ran."""
    calls = []
    handle = model.blocks[0][0].register_forward_hook(lambda *_: calls.append(1))
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    handle.remove()
    return {name: p.grad for name, p in model.named_parameters()}, len(calls)


def plain(named):
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in named.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_module_runs_once(kind):
    expected, once = backward(Net())
    model = Net(kind)
    with without_recomputation(model):
        found, calls = backward(model)
    assert calls == once == 1
    assert_same(plain(found), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wrapper"])
def test_it_is_undone_afterwards(kind):
    model = Net(kind)
    with without_recomputation(model), pytest.raises(ValueError, match="whatever"):
        raise ValueError("whatever")
    assert backward(model)[1] == 2
    assert model.grad_checkpointing == (kind == "attribute")


def test_contexts_may_be_nested():
    model = Net("attribute")
    with without_recomputation(model):
        with without_recomputation(model):
            pass
        assert backward(model)[1] == 1
    assert backward(model)[1] == 2


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_other_threads_train_as_before(kind):
    counts = []
    with without_recomputation():
        thread = threading.Thread(target=lambda: counts.append(backward(Net(kind))[1]))
        thread.start()
        thread.join()
        counts.append(backward(Net(kind))[1])
    assert counts == [2, 1]


def prepared(kind):
    model = Net(kind).eval()
    x, _ = data()
    lq.attach(model, 3, 4, first_last=None)
    return lq.calibrate(model, [x])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["fisher", "model_fisher", "output_distortion", "hawq_v2", "kl"])
def test_sensitivities_are_those_without(kind, metric):
    expected = lq.measure_sensitivity(prepared(None), [data()], metric, widths=(2, 4))
    found = lq.measure_sensitivity(prepared(kind), [data()], metric, widths=(2, 4))
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4, atol=1e-12)
        assert a.loss.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{"units": "layer"}, {"units": "block"}, {"units": "network"}, {"units": "layer", "loss": "fisher", "drop": 0.0}],
    ids=str,
)
def test_reconstructions_are_those_without(kind, options):
    states = []
    for one in (None, kind):
        model = prepared(one)
        lq.reconstruct(model, [data()[0]], iterations=5, **options)
        states.append(plain(model.state_dict()))
    assert_same(states[1], states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_those_without(kind):
    found = [lq.optimize_ranges(prepared(one), [data()], loss="task", evaluations=10) for one in (None, kind)]
    assert found[0] == found[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_synthesis(reentrant):
    made = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        model(torch.randn(16, 1, 6, 6))
        model.eval()
        if recomputes:
            model.forward = partial(checkpoint, nn.Sequential(*model), use_reentrant=reentrant)
        assert len(batchnorms(model)) == 2
        made.append(lq.synthesize(model, (1, 6, 6), 4, batch_size=4, iterations=5))
    assert torch.equal(*made)


class _Own(torch.autograd.Function):
    """Checkpointing as another library writes it."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, delta):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return None, torch.autograd.grad(y, x, delta)[0]


@pytest.mark.parametrize("metric", ["fisher", "hawq_v2"])
def test_other_code_that_recomputes_is_an_error(metric):
    model = prepared(None)
    blocks = model.blocks
    model.forward = lambda x: model.head(_Own.apply(blocks, model.stem(x)))
    with pytest.raises(StateError, match=r"blocks.0.0.* ran again in backward: the model recomputes its activations"):
        lq.measure_sensitivity(model, [data()], metric)
