"""Folding with an example: what the run settles, and what it undoes."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.folding import fold, left_unfolded
from lq.attachment.folding_check import same_outputs
from lq.attachment.pairs import FoldablePair
from tests.attachment.test_foldable import ACTED_ON, Block, LeavesOut, Switch, X
from tests.attachment.test_folding import randomize


class Normalizes(nn.Module):
    """Calls a block with an argument that says the same as its default."""

    def __init__(self):
        super().__init__()
        self.block = Switch()

    def forward(self, x):
        return self.block(x, normalize=True)


def test_the_run_says_what_an_argument_is():
    model = randomize(Normalizes()).eval()
    [left] = left_unfolded(model)
    assert "normalize decides" in left.reason and "pass example=" in left.advice
    before = model(X)
    assert lq.fold_batchnorm(model, X) == [FoldablePair("block.conv", "block.norm")]
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)


@ACTED_ON
def test_the_run_says_that_a_norm_is_left_out():
    model = randomize(LeavesOut()).eval()
    before = model(X)
    assert lq.fold_batchnorm(model, X) == []
    assert "runs block.conv 1 times and block.norm 0 times" in left_unfolded(model, X)[0].reason
    assert torch.equal(model(X), before)


class LooksAtClasses(nn.Module):
    """Does something else once the norm of its second block is gone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.second(self.first(x))
        return x if isinstance(self.second[1], nn.BatchNorm2d) else -x


@pytest.mark.parametrize("forward", [None, lambda model, batch: [model(batch), None][1]], ids=["", "returns nothing"])
def test_a_pair_that_changes_the_outputs_is_undone(forward):
    model = randomize(LooksAtClasses()).eval()
    before, state = model(X), {key: value.clone() for key, value in model.second.state_dict().items()}
    found = fold(model, X, forward)
    assert found.pairs == [FoldablePair("first.conv", "first.norm")]
    assert [(left.norm, left.reason) for left in found.left] == [
        ("second.1", "folding it would change what the two compute")
    ]
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in model.second.state_dict().items())


class Unseen(Block):
    """Reads its weight where no trace of modules sees it."""

    def __init__(self):
        super().__init__()
        self.weights = [self.conv.weight]

    def forward(self, x):
        return self.norm(self.conv(x)) + self.weights[0].sum()


def test_a_weight_that_is_read_by_another_way():
    model = randomize(Unseen()).eval()
    before = model(X)
    assert lq.fold_batchnorm(model, X) == []
    assert torch.equal(model(X), before)


def test_networks_that_the_example_does_not_run_are_folded_as_without_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.run, self.other = Block(), Block()

        def forward(self, x):
            return self.run(x)

    assert [pair.norm for pair in lq.fold_batchnorm(randomize(Two()), X)] == ["run.norm", "other.norm"]


def test_an_example_that_the_model_does_not_take():
    model = Block()
    with pytest.raises(lq.DataError, match="did not take a batch"):
        lq.fold_batchnorm(model, torch.zeros(1, 5, 8, 8))
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_chance_is_no_difference():
    class Noisy(Block):
        def forward(self, x):
            return self.norm(self.conv(x)) + torch.rand(1)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert len(lq.fold_batchnorm(randomize(Noisy()), X)) == 1
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_same_outputs():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert same_outputs([x], [x + 1e-5])
    assert not same_outputs([x], [x + 0.1])
    assert not same_outputs([x], [x * torch.nan])
    assert not same_outputs([x.double()], [x.double() + 1e-4])
    assert same_outputs([x.half()], [x.half() * 1.01])
    assert same_outputs([x[:3] * torch.nan], [x[:3]])  # nothing to compare with
    assert same_outputs([x], [x[:3]])
