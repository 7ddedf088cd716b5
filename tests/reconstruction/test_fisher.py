"""Squared gradients at the outputs of units against autograd, sample by sample, written by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lq.errors import DataError
from lq.reconstruction.fisher import squared_gradients
from lq.reconstruction.options import RunOptions
from tests.reconstruction.networks import BY_NAME, NETWORKS, InPlace, Work, network, quantized, samples


def weights_of(work, seed=3, dtype=None, **options):
    work.whole.dtype = dtype
    return squared_gradients(work.whole, RunOptions(seed=seed, **options))


def labels(model, data, seed):
    """One label for each sample, drawn as the source says: from the model's own distribution, batch after batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return [torch.multinomial(model(x).softmax(1), 1, generator=generator) for x in data]


def of_one_sample(model, module, x, label):
    """The squared gradient of the log-likelihood at a module's output, for one sample, by adding zeros to it."""
    zeros = []

    def hook(module, args, output):
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[0]

    handle = module.register_forward_hook(hook)
    with torch.enable_grad():
        likelihood = model(x[None]).log_softmax(1)[0, label]
        (gradient,) = torch.autograd.grad(likelihood, zeros)
    handle.remove()
    return gradient.square()


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind not in ("no gradients", "a comparison")])
def test_they_are_those_of_single_samples(kind):
    model, x = network(kind)
    data = list(x.split(4))
    work = Work(quantized(model, data), data, BY_NAME.get(kind, "layer"))
    found = weights_of(work)
    drawn = labels(work.twin, data, 3)
    for k, unit in enumerate(work.units):
        module = work.twin.get_submodule(unit.modules[-1])
        each = [
            [of_one_sample(work.twin, module, sample, int(label)) for sample, label in zip(batch, ys, strict=True)]
            for batch, ys in zip(data, drawn, strict=True)
        ]
        scale = torch.stack(each[0]).mean()
        dim = work.flow.outputs[k].dim
        expected = torch.cat([one for batch in each for one in batch], dim) / scale
        torch.testing.assert_close(found[k].batch(slice(0, 10)), expected, rtol=2e-3, atol=1e-5)
        assert found[k].batch(slice(0, 4)).mean().item() == pytest.approx(1, rel=1e-4)


def test_outputs_changed_in_place_have_the_gradient_from_before():
    torch.manual_seed(0)
    model, x = InPlace().eval(), samples((8,))
    work = Work(quantized(model, [x]), [x])
    found = weights_of(work)
    (label,) = labels(work.twin, [x], 3)
    twin = work.twin
    a = twin.a(x).requires_grad_()
    b = (twin.b(F.relu(a)) * 1).requires_grad_()
    c = twin.c(F.relu(b + F.relu(a)))
    likelihood = c.log_softmax(1).gather(1, label).sum()
    for outputs, output in zip(found, (a, b, c), strict=True):
        (gradient,) = torch.autograd.grad(likelihood, output, retain_graph=True)
        expected = gradient.square() / gradient.square().mean()
        torch.testing.assert_close(outputs.batch(slice(0, 10)), expected, rtol=1e-3, atol=1e-5)


def test_dense_outputs_have_a_label_at_each_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1)).eval(), samples((3, 6, 6), 4)
    work = Work(quantized(model, [x]), [x])
    (_, last) = weights_of(work)
    assert last.batch(slice(0, 4)).shape == (4, 3, 4, 4)
    with torch.no_grad():
        p = work.twin(x).softmax(1)
    # by the logits the gradient of the log-likelihood is the label minus p: one of three
    squares = last.batch(slice(0, 4))
    options = torch.stack([(F.one_hot(torch.tensor(c), 3).view(1, 3, 1, 1) - p).square() for c in range(3)])
    scale = (options.sum(2, keepdim=True) / squares.sum(1, keepdim=True)).movedim(1, 0)
    distance = (options - squares * scale.movedim(0, 1)).abs().amax(2).amin(0)
    assert distance.max() < 1e-4


def test_by_seed_and_without_a_trace():
    model, x = network("branches")
    work = Work(quantized(model, [x]), [x])
    state, modes = torch.get_rng_state(), [m.training for m in work.twin.modules()]
    first, again, other = (weights_of(work, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    rows = slice(0, 10)
    assert all(torch.equal(a.batch(rows), b.batch(rows)) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1].batch(rows), other[-1].batch(rows))
    assert [m.training for m in work.twin.modules()] == modes
    assert all(not m._forward_hooks for m in work.twin.modules())


def test_half_precision_keeps_small_gradients():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), samples((8,))
    with torch.no_grad():
        model[2].weight.mul_(1e-5)  # squares of gradients before it are far below what float16 holds
    work = Work(quantized(model, [x]), [x])
    whole, half = weights_of(work), weights_of(work, dtype=torch.float16)
    rows = slice(0, 10)
    assert half[0].stored.data.dtype == torch.float16
    torch.testing.assert_close(half[0].batch(rows), whole[0].batch(rows), rtol=2e-3, atol=1e-3)
    assert half[0].batch(rows).mean().item() == pytest.approx(1, rel=1e-2)


def test_ranks_agree_on_the_scale():
    model, x = network("branches")
    work = Work(quantized(model, [x]), [x])
    alone = weights_of(work)
    shared = weights_of(
        work, reduce=lambda tensor, operation: tensor * 8, ranks=2
    )  # the mean over ranks is 4 times its own
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(b.batch(slice(0, 10)) * 4, a.batch(slice(0, 10)), rtol=1e-5, atol=0)


def test_a_unit_without_influence_has_no_weight():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.a(x)
            return self.b(x)

    torch.manual_seed(0)
    x = samples((8,))
    first, second = weights_of(Work(quantized(Aside().eval(), [x]), [x]))
    assert not first.batch(slice(0, 10)).any() and second.batch(slice(0, 10)).any()


def test_a_model_without_logits():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            self.a(x)
            return {"loss": 1.0}

    x = samples((8,))
    work = Work(quantized(Many().eval(), [x]), [x])
    with pytest.raises(DataError, match="the forward returned dict.*must return the model's output"):
        weights_of(work)
