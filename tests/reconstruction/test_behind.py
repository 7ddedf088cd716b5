"""The network behind a unit: what it ends with, against plain runs of the float network with one output replaced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lq.errors import DataError
from lq.reconstruction.behind import Behind, classes, divergence, network_ends
from lq.reconstruction.options import RunOptions
from tests.reconstruction.networks import BY_NAME, NETWORKS, Work, network, quantized, samples


def behind(work, k, *, features=True, **options):
    """What is behind unit `k` of a piece of work, whose float units up to it are finished."""
    for j in range(k + 1):
        targets = work.whole.finish(j, work.whole.inputs(j))
    ends = network_ends(work.whole, work.data[0][:2], features=features)
    return Behind(work.whole, k, targets, ends, RunOptions(**options))


def work_of(kind, **options):
    model, x = network(kind)
    return Work(quantized(model, list(x.split(4))), list(x.split(4)), BY_NAME.get(kind, "layer"), **options)


def with_output(model, name, output, x):
    """A plain run of the model in which a module gives `output`."""
    handle = model.get_submodule(name).register_forward_hook(lambda *_: output * 1)
    try:
        return model(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_ends_as_the_network_does_with_another_output_of_the_unit(kind):
    work = work_of(kind)
    x, index = torch.cat(work.data), torch.tensor([7, 0, 3, 8])
    for k, unit in enumerate(work.units):
        found = behind(work, k)
        output = found.targets.batch(index)
        other = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(k))
        with torch.no_grad():
            expected = with_output(work.twin, unit.modules[-1], other, x[index])
            torch.testing.assert_close(found(other, index).logits, expected, rtol=1e-4, atol=1e-5)
        assert not found._computes
        assert work.twin.training is False and not any(m._forward_pre_hooks for m in work.twin.modules())
        assert not any("forward" in vars(m) for m in work.twin.modules())


def test_gradients_of_the_divergence_are_those_of_a_run_by_hand():
    work = work_of("in place")
    found, twin, x = behind(work, 0), work.twin, torch.cat(work.data)
    z = found.targets.batch(slice(2, 6)) + 0.3
    leaf = z.clone().requires_grad_()
    with torch.enable_grad():
        a = F.relu(leaf)
        logits = twin.c(F.relu(twin.b(a) + a))
        p, q = (t / 3.0 for t in (twin(x[2:6]), logits))
        total = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum()
        (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(found.divergence_gradient(z, slice(2, 6), 3.0), expected, rtol=1e-4, atol=1e-6)
    float_output = found.targets.batch(slice(2, 6))
    assert found.divergence_gradient(float_output, slice(2, 6)).abs().max() < 1e-5  # nothing is nearer to itself


def test_code_at_the_end_that_reads_an_early_unit():
    """Of that, what units read tells nothing: then the units before compute."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            first = self.a(x)
            return self.c(self.b(first.relu()).relu()) + first

    torch.manual_seed(0)
    x = samples((8,))
    work = Work(quantized(Skipping().eval(), [x]), [x])
    found = behind(work, 1)
    assert found._computes
    other = found.targets.batch(slice(0, 5)) + 1
    with torch.no_grad():
        expected = with_output(work.twin, "b", other, x[:5])
        torch.testing.assert_close(found(other, slice(0, 5)).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["resnet", "tokens", "windows"])
def test_features_are_what_the_last_layer_reads(kind):
    work = work_of(kind)
    found = behind(work, 0)
    read = []
    head = work.twin.get_submodule(found.ends.head)
    handle = head.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        work.twin(torch.cat(work.data))
    handle.remove()
    assert found.ends.head == work.units[-1].modules[0]
    torch.testing.assert_close(found.ends.features.batch(slice(0, 10)), read[0], rtol=1e-5, atol=1e-6)
    assert found.sees_features and found.sees_logits and not found.holds_head
    last = behind(work, len(work.units) - 1)
    assert last.sees_logits and not last.sees_features and last.holds_head


def test_samples_of_several_batches_in_any_order_and_from_files():
    work = work_of("samples second", memory=1)
    found = behind(work, 0)
    assert found.ends.logits.stored.on_disk
    index = torch.tensor([9, 2, 2, 5])
    selected = work.batches.select(index)
    assert torch.equal(selected, torch.cat(work.data)[index])
    output = found.targets.batch(index)
    with torch.no_grad():
        expected = work.twin(torch.cat(work.data)[index])
        torch.testing.assert_close(found(output, index).logits, expected, rtol=1e-4, atol=1e-5)


def test_means_over_ranks_count_samples():
    work = work_of("branches")

    def reduce(tensor, operation):  # the other rank: a sum of 2 over 6 samples
        return tensor + torch.tensor([2.0, 6.0])

    found = behind(work, 0, reduce=reduce, ranks=2)
    assert found.mean_of(torch.tensor(10.0), 10) == pytest.approx(12 / 16)
    assert behind(work, 0).mean_of(torch.tensor(10.0), 10) == 1
    assert [(rows.start, rows.stop) for rows in found.chunks()] == [(0, 4), (4, 8), (8, 10)]
    assert [(rows.start, rows.stop) for rows in found.chunks(5)] == [(0, 4), (4, 5)]


def test_divergence_of_images_has_classes_in_dimension_1():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    p, q = b.softmax(1), a.softmax(1)
    assert divergence(a, b).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert classes(a).shape == (2, 4, 5, 3)
    assert classes(a[:, :, 0, 0]).shape == (2, 3)


def test_networks_that_have_no_probabilities():
    torch.manual_seed(0)
    x = samples((8,))
    work = Work(quantized(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).eval(), [x]), [x])
    with pytest.raises(
        DataError, match=r"Sequential has \(2, 1\) as its output for two samples, one class; .*'relative'"
    ):
        network_ends(work.whole, x[:2], features=False)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 3)

        def forward(self, x):
            return self.a(x).sum(0)

    work = Work(quantized(Sum().eval(), [x]), [x])
    with pytest.raises(DataError, match=r"Sum returns \(3,\) for two samples, which has no row for each of them"):
        network_ends(work.whole, x[:2], features=False)


def test_units_that_nothing_reads_are_told():
    work = work_of("no gradients")
    found = behind(work, 0)
    with pytest.warns(UserWarning, match="loss='aph': no gradient of the network's output reaches unit a"):
        assert found.warn_if_unseen("aph", found.sees_logits)
    assert not behind(work, 2).warn_if_unseen("aph", True)
