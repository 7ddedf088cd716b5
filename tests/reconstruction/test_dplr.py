"""Diagonal and low rank of the Fisher information: B by hand, when it looks, what it is divided by."""

import pytest
import torch
from torch import nn

from lq.errors import SpecError
from lq.reconstruction import DPLRLoss
from lq.reconstruction.dplr import Fisher
from lq.reconstruction.flow import SampleLayout
from tests.reconstruction.networks import Work, quantized, samples
from tests.reconstruction.test_behind import behind, work_of

ROWS = SampleLayout(0, 1)


def test_both_terms_by_hand():
    """D = [[3, 0], [0, 2]], so that B = diag(1/9, 1/4), and G = [[1, 2], [4, 6]]."""
    gradients, differences = torch.tensor([[1.0, 2.0], [4.0, 6.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    unit = Fisher.of(gradients, differences, ROWS)
    output, target = torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    # |dz| of the two samples: (1, 2) and (0, 3); G |dz| = (5, 16) and (6, 18)
    low_rank = ((25 / 9 + 256 / 4) + (36 / 9 + 324 / 4)) / 2
    # means of the rows of G: 2.5 and 4; squares: (1, 4) and (0, 9)
    diagonal = ((2.5 + 16) / 2 + (0 + 36) / 2) / 2
    squared = (1 + 4 + 0 + 9) / 2
    assert unit.terms(output, target).tolist() == pytest.approx([low_rank, diagonal, squared], rel=1e-4)
    assert unit(output, target).item() == pytest.approx((low_rank + diagonal) / 2, rel=1e-4)  # nothing is divided yet


def test_the_middle_of_rows_that_are_not_orthogonal():
    generator = torch.Generator().manual_seed(0)
    g, d = (torch.rand(3, 7, generator=generator) for _ in range(2))
    unit = Fisher.of(g, d, ROWS)
    b = torch.linalg.inv(d.double() @ d.double().T)
    z = torch.randn(4, 7, generator=generator)
    projected = z.abs().double() @ g.double().T
    expected = torch.einsum("ni,ij,nj->n", projected, b, projected).mean()
    assert unit.terms(z, torch.zeros_like(z))[0].item() == pytest.approx(expected.item(), rel=1e-3)


def test_rows_that_are_the_same_twice_do_no_harm():
    row = torch.rand(1, 5)
    unit = Fisher.of(row.repeat(3, 1), row.repeat(3, 1), ROWS)
    terms = unit.terms(torch.rand(2, 5), torch.zeros(2, 5))
    assert terms.isfinite().all() and (terms >= 0).all()


def passes_of(found, noise):
    """Outputs that differ by `noise` from the float ones, four samples at a time."""

    def passes():
        for rows in found.chunks():
            target = found.targets.batch(rows)
            yield rows, target + noise[rows], target

    return passes


def objective_of(kind="branches", k=1, **options):
    work = work_of(kind)
    found = behind(work, k)
    noise = 0.1 * torch.randn(found.targets.batch(slice(0, 10)).shape, generator=torch.Generator().manual_seed(3))
    return DPLRLoss(**options).begin(found), found, noise


def test_rows_are_means_of_absolute_gradients_and_differences():
    objective, found, noise = objective_of()
    objective.begin(passes_of(found, noise))
    z = found.targets.batch(slice(0, 10)) + noise
    gradients = torch.cat([found.divergence_gradient(z[i : i + 1], slice(i, i + 1)) for i in range(10)])
    torch.testing.assert_close(objective._gradients[0], gradients.abs().mean(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(objective._differences[0], noise.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_it_looks_at_every_fifth_of_the_iterations():
    objective, found, noise = objective_of()
    objective.begin(passes_of(found, noise))
    target = found.targets.batch(slice(0, 10))
    looked = []
    for step in range(23):
        before = len(objective._gradients)
        objective.advance(step, 23, passes_of(found, noise * (1 - step / 40)))
        if len(objective._gradients) > before:
            looked.append(step)
            scaled = noise * (1 - step / 40)
            squared = scaled.square().sum(1).mean().item()
            # both terms are 1 at the refresh: the loss is the squared error
            assert objective(target + scaled, target, slice(0, 10)).item() == pytest.approx(squared, rel=1e-3)
    assert looked == [4, 9, 13, 18]
    measured = objective.measure(target + noise, target, slice(0, 10)).item()
    assert measured == pytest.approx(noise.square().sum(1).mean().item(), rel=1e-3)  # by the first rows still
    assert objective.measure(target + noise / 2, target, slice(0, 10)).item() == pytest.approx(measured / 4, rel=1e-3)


def test_a_unit_that_does_not_differ_has_the_squared_error():
    objective, found, noise = objective_of()
    objective.begin(passes_of(found, noise * 0))
    target = found.targets.batch(slice(0, 4))
    assert objective(target + 0.5, target, slice(0, 4)).item() == pytest.approx(0.25 * 8, rel=1e-5)
    assert objective.measure(target, target, slice(0, 4)).item() == 0
    objective.advance(1, 5, passes_of(found, noise))
    assert len(objective._gradients) == 1


def test_few_samples_are_looked_at():
    objective, found, noise = objective_of(samples=4)
    objective.begin(passes_of(found, noise))
    torch.testing.assert_close(objective._differences[0], noise[:4].abs().mean(0), rtol=1e-4, atol=1e-6)


def test_it_prefers_errors_that_do_not_matter():
    """The head ignores half of what it reads: errors there cost less than by the squared error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[1].weight[:, 4:] = 0
    x = samples((8,))
    work = Work(quantized(model, [x]), [x])
    found = behind(work, 0)
    objective = DPLRLoss().begin(found)
    noise = 0.1 * torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    objective.begin(passes_of(found, noise))
    target, half = found.targets.batch(slice(0, 10)), torch.tensor([1.0] * 4 + [0.0] * 4)
    seen, unseen = (objective(target + noise * part, target, slice(0, 10)).item() for part in (half, 1 - half))
    assert unseen < 1e-6 * seen


@pytest.mark.parametrize("change", [{"rank": 0}, {"temperature": 0}, {"samples": 0}], ids=str)
def test_errors(change):
    with pytest.raises(SpecError, match=r"DPLRLoss\(rank=.*: all must be positive"):
        DPLRLoss(**change)
