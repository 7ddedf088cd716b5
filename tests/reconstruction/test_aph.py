"""The average perturbation Hessian against second derivatives in float64, and what the loss makes of it."""

import pytest
import torch
from torch import nn

from lq.errors import SpecError
from lq.reconstruction import APHLoss
from lq.reconstruction.aph import perturbation_importance
from tests.reconstruction.networks import Work, quantized, samples
from tests.reconstruction.test_behind import behind, work_of


def curvature_along(work, k, signs, temperature, tail):
    """The mean over samples of ``|H r|``, H by autograd in float64 from the unit's output on, with a mean of 1."""
    layout, total = work.flow.outputs[k], 0
    found = behind(work, k)
    twin = work.twin.double()
    rows = layout.rows(found.targets.batch(slice(0, 10)).double())
    for z in rows:
        with torch.no_grad():
            p = (tail(twin, z) / temperature).softmax(-1)

        def divergence(z, p=p):
            q = (tail(twin, z) / temperature).log_softmax(-1)
            return (p * (p.log() - q)).sum()

        hessian = torch.autograd.functional.hessian(divergence, z).reshape(z.numel(), z.numel())
        total = total + (hessian @ signs.double().flatten()).abs().view_as(z)
    work.twin.float()
    return (total / total.mean()).float()


def signs_of(k, shape, seed=0):
    generator = torch.Generator().manual_seed(seed * 100_003 + k)
    return torch.randint(0, 2, shape, generator=generator) * 2 - 1


def test_it_is_the_curvature_along_a_direction_of_signs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).eval()
    data = list(samples((8,)).split(4))
    work = Work(quantized(model, data), data)
    found = perturbation_importance(behind(work, 0), APHLoss())
    expected = curvature_along(work, 0, signs_of(0, (6,)), 20.0, lambda m, z: m[2:](z))
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-3)
    assert found.mean().item() == pytest.approx(1, rel=1e-5)


def test_it_is_the_curvature_of_tokens_behind_layer_norms():
    """Where adding the same to all elements would change nothing: of the last block, what all channels share."""
    work = work_of("tokens")
    names = [unit.name for unit in work.units]
    k = names.index("blocks.1.fc2") if "blocks.1.fc2" in names else len(names) - 2
    found = behind(work, k)
    importance = perturbation_importance(found, APHLoss(temperature=2.0))
    assert importance.shape == found.targets.batch(slice(0, 1)).shape[1:]
    assert bool((importance[0] > 0).all())
    assert importance[0].mean() > 10 * importance[1:].mean()  # the head reads the first token alone
    z = found.targets.batch(slice(0, 4))
    same, apart = (
        (found.divergence_gradient(z + d, slice(0, 4)) - found.divergence_gradient(z - d, slice(0, 4))).abs().mean()
        for d in (torch.full_like(z, 1e-2), 1e-2 * signs_of(k, z.shape[1:]))
    )
    assert same < 0.05 * apart


def test_it_does_not_depend_on_batches_the_seed_decides():
    work = work_of("resnet")
    whole = perturbation_importance(behind(work, 0), APHLoss())
    work.whole.chunk = 3
    torch.testing.assert_close(perturbation_importance(behind(work, 0), APHLoss()), whole, rtol=2e-2, atol=2e-2)
    assert torch.equal(perturbation_importance(behind(work, 0, seed=1), APHLoss()).isfinite().all(), torch.tensor(True))
    other = perturbation_importance(behind(work, 0, seed=1), APHLoss())
    assert (other - whole).abs().max() > 0.05
    few = perturbation_importance(behind(work, 0), APHLoss(samples=3))
    assert (few - whole).abs().max() > 1e-3


def test_the_loss_weighs_squared_errors():
    work = work_of("resnet")
    found = behind(work, 0)
    objective, weights = APHLoss().begin(found), perturbation_importance(found, APHLoss())
    target = found.targets.batch(slice(0, 5))
    output = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    loss = objective(output, target, slice(0, 5))
    expected = ((output - target).square() * weights).mean(0).sum() / target[0, 0].numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.measure(output, target, torch.arange(5)).item() == pytest.approx(loss.item(), rel=1e-6)


def test_samples_in_another_dimension():
    work = work_of("samples second")
    found = behind(work, 0)
    objective = APHLoss().begin(found)
    output = found.targets.batch(slice(0, 4))
    assert output.shape == (5, 4, 8)
    assert objective.weights.batch(slice(0, 4)).shape == output.shape
    assert objective(output + 1, output, slice(0, 4)).item() == pytest.approx(8, rel=1e-4)


@pytest.mark.parametrize("change", [{"temperature": 0}, {"epsilon": -1}, {"samples": 0}], ids=str)
def test_errors(change):
    with pytest.raises(SpecError, match=r"APHLoss\(temperature=.*: all must be positive"):
        APHLoss(**change)
