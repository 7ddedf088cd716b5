"""Batches for data-dependent stages: how many, in which order, with what limits, without a trace."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

import lq
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from tests.helpers import QUIET, Tiny, assert_same, dataset, loader, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Reader(pl.Callback):
    """Reads batches when fitting starts."""

    def __init__(self, samples):
        self.samples = samples

    def on_fit_start(self, trainer, pl_module):
        trainer.fit_loop.setup_data()  # draws a seed for the loader in any fit
        before = torch.get_rng_state()
        self.batches = list(training_batches(trainer, self.samples, "Reading"))
        self.left_alone = torch.equal(before, torch.get_rng_state())


def read(samples, data=None, module=None, **options):
    reader = Reader(samples)
    trainer([reader], **options).fit(module or tiny(), data if data is not None else loader())
    return reader


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (8, 1), (9, 2), (32, 4), (1000, 4)])
def test_as_many_batches_as_the_samples_need(samples, batches):
    expected = list(loader())[:batches]
    assert_same(read(samples).batches, expected)


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0.75}, 3),
        ({"overfit_batches": 1}, 1),
        ({"fast_dev_run": True}, 1),
    ],
)
def test_limits_of_the_trainer_hold(options, batches):
    assert len(read(1000, **options).batches) == batches


@pytest.mark.parametrize("own", [None, "loader", "sampler"])
def test_random_state_is_restored_midway_and_at_the_end(own):
    def data():
        generator = torch.Generator().manual_seed(3)
        if own == "sampler":
            return DataLoader(dataset(), 8, sampler=RandomSampler(dataset(), generator=generator))
        return loader(shuffle=True, generator=generator if own else None)

    seen = []
    for samples in (0, 10, 1000):
        module = tiny()
        torch.manual_seed(11)
        if samples:
            assert read(samples, data(), module).left_alone
        else:
            trainer().fit(module, data())
        seen.append(module.seen)
    assert_same(seen[1], seen[0])
    assert_same(seen[2], seen[0])


def test_transfer_hooks_of_the_module_run():
    class Scaled(Tiny):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

    x, _ = read(8, module=Scaled()).batches[0]
    assert torch.equal(x, dataset().tensors[0][:8] * 2 + 1)


def test_several_loaders_are_read_together():
    class Several(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    batches = read(16, {"a": loader(), "b": loader(16, batch=4)}, Several()).batches
    assert [set(batch) for batch in batches] == [{"a", "b"}] * 2
    assert torch.equal(batches[0]["b"][0], dataset(16).tensors[0][:4])


def test_precision_of_the_trainer():
    x, _ = read(8, precision="64-true").batches[0]
    assert x.dtype == torch.float64


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_forward_runs_at_the_trainers_precision(precision, dtype):
    made, module = trainer(precision=precision), lq.attach(tiny(), 4, None)
    assert forward_of(made, module, None)(module, next(iter(loader()))).dtype == dtype


def test_reduction_on_one_rank_is_the_identity():
    reduce = reduce_over(trainer())
    value = torch.tensor([1.0, 2.0])
    assert all(torch.equal(reduce(value, operation), value) for operation in ("sum", "min", "max"))
