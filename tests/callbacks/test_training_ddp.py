"""Two ranks train as one does on their common batches: gradients, steps, weights, BatchNorms that are synchronized."""

import pytest
import torch

from tests.callbacks.training import DISTILLED, HELD, PLAIN
from tests.helpers import assert_same, run_on_ranks

SCRIPT = """
import os
import sys

sys.path.insert(0, sys.argv[3])
import torch
import torch.distributed.nn.functional as over_ranks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.callbacks.training import DISTILLED, HELD, PLAIN, updates_of
from tests.helpers import dataset, fit, tiny

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("LOCAL_RANK", 0))
options = {"devices": ranks, "strategy": "ddp", "sync_batchnorm": True} if ranks > 1 else {}
synchronized = []


def on_cpu(self, x):
    # What SyncBatchNorm, which torch has for GPUs alone, is defined to do.
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    synchronized.append(1)
    count = x.numel() / x.shape[1] * ranks
    mean = over_ranks.all_reduce(x.sum((0, 2, 3))) / count
    var = over_ranks.all_reduce((x - mean[:, None, None]).square().sum((0, 2, 3))) / count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    shape = (1, -1, 1, 1)
    scale = self.weight * torch.rsqrt(var + self.eps)
    return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


nn.SyncBatchNorm.forward = on_cpu
nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # it asks for a GPU
for name, stages in {**PLAIN, **DISTILLED, **HELD}.items():
    for norm in (False, True):
        module = tiny(norm=norm, lr=0.3 if name in HELD else 0.05)
        sampler = DistributedSampler(dataset(64), ranks, rank, shuffle=False)
        data = DataLoader(dataset(64), batch_size=16 // ranks, sampler=sampler)
        with updates_of(module) as updates:
            callbacks = stages()
            made = fit(module, callbacks, data, max_epochs=2, use_distributed_sampler=False, **options)
        assert made.world_size == ranks and made.global_step == 8
        first = next(u.gradients for u in updates if u.own), next(u.gradients for u in updates if not u.own)
        found = {"state": module.state_dict(), "own": first[0], "users": first[1]}
        if name in HELD:
            found["known"] = callbacks[-1].state_dict()["weights"]
        torch.save(found, f"{out}/{name}-{norm}-{ranks}-{made.global_rank}.pt")
if ranks > 1:
    assert len(synchronized) == 2 * 8 * len({**PLAIN, **DISTILLED, **HELD})  # of all runs with norms
    made.strategy.barrier()
    torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What one rank and two ranks ended with, by the name of the run."""
    out = tmp_path_factory.mktemp("ranks")
    script = out / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 1, out)
    run_on_ranks(script, 2, out)
    return lambda name: torch.load(out / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("norm", [False, True], ids=["", "SyncBatchNorm"])
@pytest.mark.parametrize("name", [*PLAIN, *DISTILLED])
def test_two_ranks_train_as_one(trained, name, norm):
    one, first, second = (trained(f"{name}-{norm}-{rank}") for rank in ("1-0", "2-0", "2-1"))
    assert_same(second, first)
    # Sums in another order differ in the last bits, which nothing may amplify: not the scale of LSQ's gradient either.
    for part, least in {"own": 1e-9, "users": 1e-7}.items():
        assert one[part] and one[part].keys() == first[part].keys()
        for key, gradient in one[part].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(first[part][key], gradient, rtol=0, atol=max(1e-4 * scale, least))
    assert one["state"].keys() == first["state"].keys()
    for key, value in one["state"].items():
        torch.testing.assert_close(first["state"][key], value, rtol=0, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("norm", [False, True], ids=["", "SyncBatchNorm"])
@pytest.mark.parametrize("name", HELD)
def test_two_ranks_hold_the_same_weights(trained, name, norm):
    first, second = (trained(f"{name}-{norm}-2-{rank}") for rank in (0, 1))
    assert_same(second, first)
    assert any(part["frozen"].any() for part in first["known"].values())
