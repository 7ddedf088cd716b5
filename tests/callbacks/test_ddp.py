"""Two ranks: the same ranges and widths as one rank on the same data, and training that keeps the ranks equal."""

import torch

from tests.helpers import assert_same, run_on_ranks

SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from lq.callbacks import AllocateBits, FineTune, LearnNoiseScale, Quantize
from tests.helpers import dataset, fit, tiny
from torch.utils.data import DataLoader

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}


def data():
    return DataLoader(dataset(32), batch_size=16 // ranks)


def save(trainer, module, name):
    torch.save(module.state_dict(), f"{out}/{name}-{ranks}-{trainer.global_rank}.pt")


module = tiny()
made = fit(module, [Quantize(4, 4, fold_bn=False, calibration_samples=32)], data(), max_epochs=0, **options)
save(made, module, "calibrated")
module = tiny()
allocate = AllocateBits("8x", granularity="channel", activations=5.0, samples=32)
made = fit(module, [Quantize(8, 8, calibration_samples=32), allocate], data(), max_epochs=0, **options)
save(made, module, "allocated")
if ranks > 1:
    module = tiny()
    tuner = FineTune("lsq", distill=1.0, reestimate_bn=16)
    made = fit(module, [Quantize(4, 4, fold_bn=False), tuner], data(), max_epochs=2, **options)
    assert made.world_size == 2 and made.global_step == 4
    save(made, module, "trained")
    for name, aim in (("targets", {"weights": 3, "activations": 3}), ("budget", {"activations": 4, "budget": 3.0})):
        module = tiny()
        tuner = LearnNoiseScale(**aim, until=0.5, quantizer_lr=0.1)
        made = fit(module, [Quantize(8, 8, fold_bn=False), tuner], data(), max_epochs=4, **options)
        assert made.global_step == 8 and tuner._descent.settled_at == 3
        save(made, module, name)
    made.strategy.barrier()
    torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


def test_two_ranks_calibrate_and_allocate_as_one_and_train(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 1, tmp_path)
    run_on_ranks(script, 2, tmp_path)

    def load(name):
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    one, first, second = load("calibrated-1-0"), load("calibrated-2-0"), load("calibrated-2-1")
    assert sum(key.endswith("log2_step") for key in one) == 5
    assert_same(first, one)
    assert_same(second, one)
    one_allocated = load("allocated-1-0")
    assert len({*one_allocated["net.3.parametrizations.weight.0.bits"].tolist()}) > 1
    assert_same(load("allocated-2-0"), one_allocated)
    assert_same(load("allocated-2-1"), one_allocated)
    for name in ("targets", "budget"):
        # running statistics are those of each rank until its next forward
        learned, other = ({k: v for k, v in load(f"{name}-2-{r}").items() if "running" not in k} for r in (0, 1))
        assert_same(other, learned)
        assert all(bits.equal(bits.round()) for key, bits in learned.items() if key.endswith("bits"))
    trained = load("trained-2-0")
    assert_same(load("trained-2-1"), trained)
    for key, value in trained.items():
        if key.endswith(("log2_step", "original")):
            assert not torch.equal(value, one[key]), f"{key} did not move"
