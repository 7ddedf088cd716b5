"""What a file of finished units says of the run that it belongs to."""

from dataclasses import replace

import pytest
import torch

from lq.reconstruction.fingerprint import describe_options, digest_over_ranks
from lq.reconstruction.options import Options, RunOptions

# As version 0.1.0 wrote it, but for the folders of lq's files.
DEFAULT = (
    "lq.method.Method(rounding=lq.adaround.AdaRound(penalty=0.01, beta=tuple(20.0, 2.0), warmup=0.2, "
    "schedule='linear', lr=None), loss=lq.losses.RelativeLoss(), drop=lq.drop.Constant(probability=0.5), "
    "iterations=20000, batch_size=32, activation_mode='learned', step_lr=None, early_stop=False, compile=False, "
    "regularization=0.0, bias_lr=0.0, start='float')"
)


def test_options_are_told_as_before():
    assert describe_options(Options()) == DEFAULT
    assert describe_options(RunOptions(watch=print)) == DEFAULT
    names = {"rounding": "adaround", "loss": "relative", "drop": 0.5}
    objects = {"rounding": Options().rounding_method, "loss": Options().loss_function}
    assert describe_options(Options(**names)) == describe_options(Options(**objects))


@pytest.mark.parametrize(
    "change",
    [{"iterations": 5}, {"loss": "mse"}, {"drop": 0.0}, {"early_stop": True}, {"start": "feedback"}, {"bias_lr": 0.1}],
    ids=str,
)
def test_options_that_decide_the_fit(change):
    assert describe_options(replace(Options(), **change)) != DEFAULT


@pytest.mark.parametrize(
    "change",
    [
        {"units": "layer"},
        {"metric": "loss", "merges": 1, "search_iterations": 3},
        {"memory": 10.0, "dtype": "float16", "seed": 3, "resume": "a.pt"},
    ],
    ids=str,
)
def test_options_that_are_compared_otherwise_or_make_no_difference(change):
    assert describe_options(replace(Options(), **change)) == DEFAULT


def test_options_that_came_later_are_told_where_they_are_set(monkeypatch):
    """So that files from before them go on: here one of the first is taken for a later one."""
    import lq.reconstruction.fingerprint as source

    monkeypatch.setattr(source, "_ALWAYS", tuple(name for name in source._ALWAYS if name != "bias_lr"))
    assert describe_options(Options()) == DEFAULT.replace(", bias_lr=0.0", "")
    assert describe_options(Options(bias_lr=0.5)) == DEFAULT.replace(", bias_lr=0.0", "")[:-1] + ", bias_lr=0.5)"


def test_one_rank_has_its_own_digest():
    assert digest_over_ranks("00ff", RunOptions(), torch.device("cpu")) == "00ff"


def test_ranks_in_another_order():
    """What each of two ranks adds to the sum depends on its number: data that change ranks are other data."""
    digests, sent = ("00ff" * 8, "0a0b" * 8), {}

    def reduced(rank, digest):
        reduce = lambda tensor, _: sent.setdefault((rank, digest), tensor)  # noqa: E731
        return digest_over_ranks(digest, RunOptions(reduce=reduce, ranks=2, rank=rank), torch.device("cpu"))

    assert reduced(1, digests[0]) == "0001fe" * 8
    for rank, digest in ((0, digests[0]), (0, digests[1]), (1, digests[1])):
        reduced(rank, digest)
    first, second = digests
    assert not torch.equal(sent[0, first] + sent[1, second], sent[0, second] + sent[1, first])
