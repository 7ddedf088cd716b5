"""GLF against its formula, written out on runs of the float network."""

import pytest
import torch

from lq.errors import SpecError
from lq.reconstruction import GlobalLoss
from tests.reconstruction.test_behind import behind, work_of
from tests.reconstruction.test_dplr import passes_of


def noise_of(found, seed):
    return 0.1 * torch.randn(found.targets.batch(slice(0, 10)).shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("local", [2.0, 0.5])
def test_both_terms_over_their_first_values(local):
    work = work_of("tokens")
    found, twin = behind(work, 0), work.twin
    objective = GlobalLoss(local).begin(found)
    first, later = noise_of(found, 0), noise_of(found, 1) / 2
    objective.begin(passes_of(found, first))

    def terms(noise):
        z = found.targets.batch(slice(0, 10))

        def features(patches):
            x = patches.flatten(2).transpose(1, 2)
            x = torch.cat([twin.token.expand(len(x), -1, -1), x], 1) + twin.position
            return twin.norm(twin.blocks(x))[:, 0]

        with torch.no_grad():
            difference = features(z + noise) - features(z)
        return difference.square().sum(1).mean() / 8, noise.square().sum((1, 2, 3)).mean() / noise[0].numel()

    (f0, y0), (f, y) = terms(first), terms(later)
    squared = y0 * noise_of(found, 0).shape[1]  # lambda of the penalty knows sums over channels
    expected = (f / f0 + local * y / y0) / (1 + local) * squared
    target = found.targets.batch(slice(0, 10))
    with torch.no_grad():
        loss = objective(target + later, target, slice(0, 10))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    with torch.no_grad():
        assert objective.measure(target + first, target, slice(0, 10)).item() == pytest.approx(squared.item(), rel=1e-3)


def test_gradients_reach_the_output_through_the_network():
    work = work_of("resnet")
    found = behind(work, 0)
    objective = GlobalLoss(local=0.0).begin(found)
    noise = noise_of(found, 0)
    objective.begin(passes_of(found, noise))
    target = found.targets.batch(torch.tensor([6, 1]))
    output = (target + noise[[6, 1]]).requires_grad_()
    with torch.enable_grad():
        loss = objective(output, target, torch.tensor([6, 1]))
        (gradient,) = torch.autograd.grad(loss, output)
    step = 1e-3 * gradient / gradient.square().sum().sqrt()
    with torch.no_grad():
        up, down = (objective(output + way * step, target, torch.tensor([6, 1])).item() for way in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(gradient.square().sum().sqrt().item(), rel=2e-2)
    assert all(p.grad is None for p in work.twin.parameters())


def test_the_last_layer_has_its_squared_error():
    work = work_of("branches")
    found = behind(work, len(work.units) - 1)
    objective = GlobalLoss().begin(found)
    target = found.targets.batch(slice(0, 3))
    assert objective(target + 2, target, slice(0, 3)).item() == pytest.approx(4 * 8, rel=1e-5)


def test_a_unit_without_error_at_first():
    work = work_of("branches")
    found = behind(work, 1)
    objective = GlobalLoss().begin(found)
    objective.begin(passes_of(found, noise_of(found, 0) * 0))
    target = found.targets.batch(slice(0, 3))
    with torch.no_grad():
        assert objective(target, target, slice(0, 3)).item() == pytest.approx(0, abs=1e-6)
        assert objective(target + 1, target, slice(0, 3)).item() > 1


def test_errors():
    with pytest.raises(SpecError, match=r"GlobalLoss\(local=-1\): the weight must not be negative"):
        GlobalLoss(local=-1)
